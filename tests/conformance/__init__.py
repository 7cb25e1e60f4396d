"""A conformance suite for anyone's implementation of ε-DPO. It needs Python 3.10 and NumPy. `README.md` describes it.

    python -m tests.conformance --impl my_package.my_module:my_function      a Python function (or my_file.py:my_function)
    python -m tests.conformance --command './my_port' --report report.json   a program in any language
    pytest tests/conformance --impl my_package.my_module:my_function         the same, a test for each property
    python -m tests.conformance.scales my_package.my_module:my_function      a table: what passes, from which scale on
    python -m tests.conformance.cases > cases.jsonl                          writes the cases

A Python function takes one case and returns its answer; B pairs, 2B responses: chosen of pair i is i, rejected is B + i.

    def my_function(case):                             # a dict
        if case["entry"] != "logits": return None      # others: "packed", "sums", "run"; None declines
        labels = case["labels"]                        # 2B int64 arrays (T_i,); lengths differ
        f, f_ref = case["policy_logits"], case["ref_logits"]          # 2B float32 arrays (T_i, V) each
        beta, epsilon_check, epsilon_step = case["beta"], case["epsilon_check"], case["epsilon_step"]
        sizes = case["micro_batches"]                  # how the B pairs of this one optimizer step come; sums to B
        case["baseline"]                               # "arithmetic" or "harmonic": which next β is asked for
        ...
        return {"step": (B,), "beta": (B,), "loss": float, "next_beta": float}      # β̃ is "beta"; anything array-like
        # may be added: "margin", "losses", "delta_minus", "delta_plus": (B,); "kl": (2B,); "grad": like policy_logits
"""
