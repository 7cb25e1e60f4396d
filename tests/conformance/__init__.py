"""A conformance suite for anyone's implementation of ε-DPO. It needs Python 3.10, numpy and pytest.

    pytest tests/conformance --impl my_package.my_module:my_function     a Python function (or my_file.py:my_function)
    pytest tests/conformance --command './my_port'                       a program in any language
    python -m tests.conformance.scales my_package.my_module:my_function  a table: what passes, from which scale on
    python -m tests.conformance.cases > cases.jsonl                      writes the cases; `cases.jsonl` here is what it wrote

`--baseline harmonic` if next β is the authors' code's; `--level exact` if cases that float32 log-softmaxes cannot solve must
pass as well; `--timeout SECONDS` for a slow program; `--confcutdir tests/conformance` where torch is not installed.

A Python function takes one case and gives its answer; B pairs, 2B responses: chosen of pair i is i, rejected is B + i.

    def my_function(case):                             # a dict
        if case["entry"] != "logits": return None      # others: "packed", "sums"; None: not offered
        labels = case["labels"]                        # 2B int64 arrays (T_i,); lengths differ
        f, f_ref = case["policy_logits"], case["ref_logits"]          # 2B float32 arrays (T_i, V) each
        beta, epsilon_check, epsilon_step = case["beta"], case["epsilon_check"], case["epsilon_step"]
        sizes = case["micro_batches"]                  # how the B pairs of this one optimizer step come; sums to B
        ...
        return {"step": (B,), "beta": (B,), "loss": float, "next_beta": float}      # β̃ is "beta"; anything array-like
        # may be added: "margin", "losses", "delta_minus", "delta_plus": (B,);  "grad": 2B arrays like policy_logits

A program reads one case a line (JSON) and writes one answer a line, in order, with the case's "id" in each;
{"id": ..., "skip": "why"} declines a case. The case file's first line is its head, which explains every field and flag;
`--command` does not send it.

The suite: `exact.py` (what is right, at 60 digits), `cases.py` (the cases), `oracle.py` (a second implementation, in
NumPy), `mistakes.py` (the same, each with one mistake), `judging.py` (asks, judges, finds the smallest failing pair),
`adapters.py` (examples), `port.js` (an example in another language).
"""
