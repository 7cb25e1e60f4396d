"""TRL's `DPOTrainer`, installed and called unmodified, for what plain DPO and ε-DPO share: no number here is ours.

Needs TRL (pip install trl); skipped without it.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

import epsdpo  # noqa: E402

from .cases import read  # noqa: E402
from .failures import complete  # noqa: E402
from .judging import complaints  # noqa: E402


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *"abcdefghijklm"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=1, pad_token_id=0, initializer_range=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    policy = transformers.LlamaForCausalLM(config)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    pairs = [("a b", "c d e", "f"), ("c", "a", "b b b b"), ("d e f", "g h", "i j k"), ("m", "l k j", "i h")]
    rows = [{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in pairs]
    folder = str(tmp_path_factory.mktemp("trl"))
    args = trl.DPOConfig(
        output_dir=folder, beta=0.3, per_device_train_batch_size=4, use_cpu=True, report_to=[], bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    return trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=fast,
    )


def test_loss_rewards_and_gradient_are_those_of_dpotrainer(trainer):
    trainer.model.eval()
    rows = [trainer.train_dataset[i] for i in range(4)]
    batch = trainer.data_collator(rows)  # (2B, T), chosen first
    trainer.model.zero_grad()
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    theirs.backward()
    gradient = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    logged = {k: v[-1] for k, v in trainer._metrics["eval"].items()}

    plain = transformers.LlamaForCausalLM(
        trainer.model.config
    )  # TRL patches the model's forward; the weights are the same
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    plain.load_state_dict(trainer.ref_model.state_dict())
    with torch.no_grad():
        ref_logits = plain(**inputs).logits
    plain.load_state_dict(trainer.model.state_dict())
    mask = batch["completion_mask"][:, 1:].bool()
    owner = torch.arange(len(mask))[:, None].expand_as(mask)[mask]
    labels = batch["input_ids"][:, 1:][mask]
    stats = epsdpo.token_stats(plain(**inputs).logits[:, :-1][mask], ref_logits[:, :-1][mask], labels, 0.01)
    sums = epsdpo.sum_over_responses(stats, owner, len(mask))
    chosen, rejected = (epsdpo.TokenStats(*(x.chunk(2)[i] for x in sums)) for i in range(2))
    ours = epsdpo.epsdpo_loss(chosen, rejected, beta=0.3, epsilon_step=0.0)
    assert ours.step.any(), "with ε_s = 0 the steps change nothing"
    ours.loss.backward()

    assert theirs.item() == pytest.approx(ours.loss.item(), rel=1e-5)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(p.grad, gradient[name], rtol=1e-3, atol=1e-6)
    assert logged["rewards/margins"] == pytest.approx(0.3 * ours.margin.mean().item(), rel=1e-4)
    assert logged["rewards/accuracies"] == pytest.approx((ours.margin > 0).float().mean().item())
    assert logged["logps/chosen"] == pytest.approx(chosen.logp.mean().item(), rel=1e-5)
    assert logged["logps/rejected"] == pytest.approx(rejected.logp.mean().item(), rel=1e-5)


class GivenLogProbabilities(torch.nn.Module):
    """Stands where the model stands: a response is one token, its log-probability the case's sum."""

    def __init__(self, logp: list[float]):
        super().__init__()
        self.log_probs = torch.tensor(logp)[:, None]  # (2B, 1)

    def forward(self, **_):
        zeros = torch.zeros_like(self.log_probs)
        return SimpleNamespace(log_probs=self.log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def test_dpotrainer_passes_the_cases_of_plain_dpo(trainer, monkeypatch):
    """The suite's own cases with ε_s = 0, given as sums per response, judged as any implementation's answers are."""
    monkeypatch.setattr(trainer, "precompute_ref_logps", True)
    asked = [complete(c | {"epsilon_step": 0.0}) for c in read() if c["entry"] == "sums"]
    for case in asked:
        half = len(case["logp"]) // 2
        monkeypatch.setattr(trainer, "beta", case["beta"])
        inputs = {
            "input_ids": torch.full((2 * half, 2), 3),
            "attention_mask": torch.ones(2 * half, 2, dtype=torch.long),
            "completion_mask": torch.tensor([[0, 1]] * 2 * half),
            "ref_chosen_logps": torch.tensor(case["ref_logp"][:half]),
            "ref_rejected_logps": torch.tensor(case["ref_logp"][half:]),
        }
        loss = trainer.compute_loss(GivenLogProbabilities(case["logp"]).eval(), inputs)
        assert not complaints(case, {"loss": loss}, "arithmetic", names=("loss",)), case["id"]
    assert len(asked) >= 10
