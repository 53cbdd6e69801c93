"""Facts refuse what cannot be packed with one line; the probe checks the rest and catches a wrong packed
pass."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tests.engine import worlds

from dpo_lora.engine import attention, eligibility
from dpo_lora.engine.eligibility import Verdict, judge, probe, read_facts
from dpo_lora.engine.proofs import Proofs


def judged(base, tmp_path, longest=30, **engine):
    rows = worlds.pairs(2)
    trainer = worlds.trainer(base, rows, tmp_path)
    return judge(trainer.model, trainer.data_collator(rows), longest, **engine)


@pytest.mark.parametrize("name", sorted(worlds.configs()))
def test_known_architectures_are_eligible(name, tmp_path):
    verdict = judged(worlds.model(name), tmp_path)
    assert verdict.eligible, verdict.reason
    assert verdict.difference < 1e-5


def test_a_window_smaller_than_the_data_is_packed_where_it_is_known():
    known = [worlds.windowed(name) for name in worlds.WINDOWS]
    assert {base.config.model_type for base in known} == eligibility._WINDOWED, "each is compared with stock"
    assert [read_facts(base, longest=1000) for base in known] == [None] * len(known)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    other = tf.Starcoder2ForCausalLM(tf.Starcoder2Config(**sizes, sliding_window=16))
    assert read_facts(other, longest=16) is None
    assert "sliding window of 16" in read_facts(other, longest=17)


def test_frequencies_that_change_with_the_longest_row_are_refused_in_any_kind_of_layer():
    sliding, full = (
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
    )
    config = worlds.configs()["gemma3"]
    config.rope_parameters = {"sliding_attention": sliding, "full_attention": full}
    base = tf.AutoModelForCausalLM.from_config(config)
    assert read_facts(base, longest=128) is None
    assert "changes its rotary frequencies beyond 128" in read_facts(base, longest=129)


@pytest.mark.parametrize(
    "config, word",
    [
        (
            tf.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=20),
            "encoder-decoder",
        ),
        (tf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20), "recurrent"),
        (tf.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=20), "interface"),
    ],
)
def test_other_architectures_are_refused_in_one_line(config, word):
    cls = tf.T5ForConditionalGeneration if config.model_type == "t5" else None
    base = cls(config) if cls else tf.AutoModelForCausalLM.from_config(config)
    reason = read_facts(base, 10)
    assert word in reason and "\n" not in reason


def test_probe_catches_a_wrong_kernel(tmp_path, monkeypatch):
    right = attention.KERNELS["block"]

    def leaky(query, key, value, plan, rule):
        return right(query, key, value, plan, rule._replace(scale=rule.scale * 1.01))

    monkeypatch.setitem(attention.KERNELS, "block", leaky)
    verdict = judged(worlds.model(), tmp_path, layers="plain")
    assert not verdict.eligible and "differ by" in verdict.reason


def test_probe_says_when_the_packed_pass_fails(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(attention.KERNELS, "block", broken)
    verdict = judged(worlds.model("olmo2"), tmp_path)
    assert not verdict.eligible and "no kernel image" in verdict.reason


def test_probe_leaves_no_trace(tmp_path):
    rows = worlds.pairs(2)
    trainer = worlds.trainer(worlds.model("gpt2"), rows, tmp_path)
    base = trainer.model.get_base_model()
    before, state = base.config._attn_implementation, torch.get_rng_state()
    probe(trainer.model, trainer.data_collator(rows))
    assert base.config._attn_implementation == before and trainer.model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_works_while_attached(tmp_path):
    from dpo_lora.engine.forward import PackedForward

    base = worlds.model().eval()
    prompt = torch.tensor([[5, 6, 7]])
    expected = base.generate(prompt, max_new_tokens=5, do_sample=False)
    packed = PackedForward(base)
    packed.install()
    assert torch.equal(base.generate(prompt, max_new_tokens=5, do_sample=False), expected)


def test_a_passed_probe_is_not_run_again_on_the_same_bits(tmp_path, monkeypatch):
    rows = worlds.pairs(2)
    proofs = Proofs(tmp_path / "proofs", "these weights")
    models = [worlds.trainer(worlds.model("llama"), rows, tmp_path) for _ in range(2)]
    first, second = (judge(one.model, one.data_collator(rows), 30, proofs) for one in models)
    assert first.eligible and not first.known
    assert second == Verdict(True, None, first.difference, known=True)
    file = next((tmp_path / "proofs").glob("*.json"))
    file.write_text("{")
    assert not judge(models[0].model, models[0].data_collator(rows), 30, proofs).known, "a broken note says nothing"


def test_whatever_a_probe_depends_on_is_in_its_key(tmp_path, monkeypatch):
    rows = worlds.pairs(3)
    proofs = Proofs(tmp_path, "these weights")
    trainer = worlds.trainer(worlds.model("llama"), rows[:2], tmp_path)
    model, batch = trainer.model, trainer.data_collator(rows[:2])
    keys = [proofs.key(model, batch)]
    assert proofs.key(model, batch) == keys[0]
    keys.append(Proofs(tmp_path, "others").key(model, batch))
    keys.append(proofs.key(model, trainer.data_collator(rows[1:])))
    keys.append(proofs.key(model, batch, kernel="sdpa"))
    with torch.autocast("cpu", torch.bfloat16):
        keys.append(proofs.key(model, batch))
    with monkeypatch.context() as changed:
        changed.setattr("dpo_lora.engine.proofs._code", lambda: "another version")
        keys.append(proofs.key(model, batch))
    with monkeypatch.context() as changed:
        changed.setattr(model.peft_config["default"], "lora_alpha", 99)
        keys.append(proofs.key(model, batch))
    weight = next(p for n, p in model.named_parameters() if "lora_B" in n)
    weight.data[0, 0] += 1
    keys.append(proofs.key(model, batch))
    assert len(set(keys)) == len(keys) == 8
    monkeypatch.setattr(type(model.get_base_model()), "__module__", "code_that_came_with_a_model")
    assert proofs.key(model, batch) is None


def test_a_probe_that_was_not_passed_is_not_kept(tmp_path, monkeypatch):
    rows = worlds.pairs(2)
    trainer = worlds.trainer(worlds.model("llama"), rows, tmp_path)
    monkeypatch.setitem(eligibility.TOLERANCE, torch.float32, -1.0)
    verdict = judge(trainer.model, trainer.data_collator(rows), 30, Proofs(tmp_path / "proofs", "these weights"))
    assert not verdict.eligible
    assert not (tmp_path / "proofs").exists()
