"""Width transfer: factors by role against hand-computed ones, the base itself, initialization, ties, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import muon8bit
from muon8bit import AdaMuon8bit, Muon8bit, NorMuon8bit, Scaling, param_groups

SIZES = {
    "llama": {},
    "gpt2": {},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    | {"num_experts_per_tok": 2, "q_lora_rank": 12, "kv_lora_rank": 8}
    | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
}


def config(kind="llama", width=32, **more):
    heads = width // 16
    if kind == "gpt2":
        return AutoConfig.for_model(kind, vocab_size=99, n_embd=width, n_head=heads, n_layer=1, n_positions=16, **more)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, **SIZES[kind]}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 99}
    sizes |= {"moe_intermediate_size": width} if kind == "deepseek_v3" else {}
    return AutoConfig.for_model(kind, **{**sizes, **more})


def model_of(kind="llama", width=32, device="meta", **more):
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config(kind, width, **more))


def factors(model, base, rule="spectral", adjust="match_rms_adamw", optimizer="muon8bit", roles=()):
    """Name -> (role, init, lr, decay) of the routes; lr and decay out of the groups, whose base's are 1 and .5."""
    scaling = Scaling(rule, base=base, optimizer=optimizer, roles=roles)
    groups = param_groups(model, lr=1.0, adamw_lr=1.0, weight_decay=0.5, adjust_lr_fn=adjust, scaling=scaling)
    rates = {name: (group["lr"], 2 * group["weight_decay"]) for group in groups for name, _ in group["params"]}
    return {r.name: (r.role, r.scale.init, *rates[r.name]) for r in groups.routes}


def pick(found, part):
    """The one value of all parameters whose names have this part."""
    values = {value for name, value in found.items() if part in name}
    assert len(values) == 1, (part, values)
    return values.pop()


ROOT = 0.5  # of 1/4: the model is four times as wide as the base
# part of a name -> role, init, lr, decay per unit of lr
UNTIED = {
    "embed_tokens": ("embedding", 1, 1, 1 / 4),
    "layernorm": ("vector", 1, 1, 0),
    "model.norm": ("vector", 1, 1, 0),
    "lm_head": ("head", 1 / 4, 1 / 4, 1),
}
BY_RULE = {
    ("spectral", "match_rms_adamw", "muon8bit"): UNTIED | {"proj": ("hidden", ROOT, ROOT, ROOT)},
    ("spectral", "spectral", "muon8bit"): UNTIED | {"proj": ("hidden", ROOT, 1, 1 / 4)},
    ("spectral", "original", "muon8bit"): UNTIED | {"proj": ("hidden", ROOT, 1, 1 / 4)},
    ("spectral", "match_rms_adamw", "normuon8bit"): UNTIED | {"proj": ("hidden", ROOT, ROOT, ROOT)},
    ("spectral", "match_rms_adamw", "adamuon8bit"): UNTIED | {"proj": ("hidden", ROOT, 1 / 4, 1)},
    ("spectral", "match_rms_adamw", "adamw"): UNTIED | {"proj": ("hidden", ROOT, 1 / 4, 1)},
    ("essential", "match_rms_adamw", "muon8bit"): UNTIED
    | {"proj": ("hidden", ROOT, 1 / 4, 1), "embed_tokens": ("embedding", 1, 1, ROOT)}
    | {"lm_head": ("head", 1 / 4, 1 / 4, 2)},
    ("essential", "original", "muon8bit"): UNTIED
    | {"proj": ("hidden", ROOT, 1 / 2, 1 / 2), "embed_tokens": ("embedding", 1, 1, ROOT)}
    | {"lm_head": ("head", 1 / 4, 1 / 4, 2)},
    ("essential", "match_rms_adamw", "adamw"): UNTIED
    | {"proj": ("hidden", ROOT, 1 / 4, 1), "embed_tokens": ("embedding", 1, 1, ROOT)}
    | {"lm_head": ("head", 1 / 4, 1 / 4, 2)},
}


@pytest.mark.parametrize(("rule", "adjust", "optimizer"), BY_RULE)
def test_factors_of_each_role_are_those_of_the_rule(rule, adjust, optimizer):
    found = factors(model_of(width=128), config(), rule, adjust, optimizer)
    for part, (role, *numbers) in BY_RULE[rule, adjust, optimizer].items():
        name, *others = pick(found, part)
        assert name == role
        assert others == pytest.approx(numbers, rel=1e-9), part


@pytest.mark.parametrize(
    ("kind", "part", "values"),
    [
        ("mixtral", "mlp.gate.weight", ("router", 1 / 4, 1 / 4, 1)),
        ("mixtral", "gate_up_proj", ("hidden", ROOT, ROOT, ROOT)),
        ("mixtral", "down_proj", ("hidden", ROOT, ROOT, ROOT)),
        # Latents of a fixed size: 12 or 12 rows from four times as many columns, 0.2 sqrt(columns) multiplied anyway.
        ("deepseek_v3", "q_a_proj", ("hidden", ROOT, 1 / 2 / 2, (1 / 4) / (1 / 4))),
        ("deepseek_v3", "kv_a_proj", ("hidden", ROOT, 1 / 2 / 2, 1)),
        # Four times as many rows from a latent: sqrt(4) / sqrt(4).
        ("deepseek_v3", "kv_b_proj", ("hidden", 1, 1, 1 / 4)),
        ("deepseek_v3", "q_b_proj", ("hidden", 1, 1, 1 / 4)),
        ("deepseek_v3", "a_layernorm", ("vector", 1, 1, 0)),
        ("gpt2", "c_attn.weight", ("hidden", ROOT, ROOT, ROOT)),
        ("gpt2", "wpe", ("embedding", 1, 1, 0)),
        ("gpt2", "mlp.c_proj.bias", ("vector", 1, 1, 0)),
    ],
)
def test_factors_of_routers_experts_latents_and_transposed_weights(kind, part, values):
    role, *numbers = pick(factors(model_of(kind, 128), config(kind)), part)
    assert role == values[0]
    assert numbers == pytest.approx(values[1:], rel=1e-9)


def test_a_projection_cut_by_head_keeps_its_rate_since_a_head_keeps_its_shape():
    model, scaling = model_of("deepseek_v3", 128), Scaling(base=config("deepseek_v3"))
    groups = param_groups(model, lr=1.0, scaling=scaling, split_heads="head")
    rates = {name: group["lr"] for group in groups for name, _ in group["params"]}
    assert pick(rates, "kv_b_proj") == 1
    assert pick(rates, "q_a_proj") == 0.25


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_stored_by_inputs_has_the_same_rate_as_one_stored_by_outputs(transposed):
    """Outputs four times as many, inputs the same: the raw O has twice the rate, and sqrt(rows) is divided out."""
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(64, 8) if transposed else nn.Linear(8, 64)
    model = nn.Sequential(nn.Embedding(9, 8), layer, nn.Linear(64, 8), nn.Linear(8, 9))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes |= {"1.weight": (8, 16) if transposed else (16, 8), "1.bias": (16,), "2.weight": (8, 16)}
    found = factors(model, shapes, adjust="spectral")["1.weight"]
    storage = 1 / 2 if transposed else 2  # what "spectral" multiplies by itself, which takes rows for outputs
    assert found[1:] == pytest.approx((1, 2 / storage, 1 / 4 * storage / 2), rel=1e-9)


@pytest.mark.parametrize("rule", ["spectral", "essential"])
@pytest.mark.parametrize("kind", SIZES)
def test_at_the_width_of_the_base_nothing_changes(kind, rule):
    torch.manual_seed(0)
    model = model_of(kind, device="cpu")
    before = [p.clone() for p in model.parameters()]
    for base in (config(kind), model_of(kind), {n: tuple(p.shape) for n, p in model.named_parameters()}):
        scaling = Scaling(rule, base=base)
        lr = torch.tensor(3e-3)
        plain, scaled = (param_groups(model, lr=lr, weight_decay=0.07, scaling=s) for s in (None, scaling))
        assert len(plain) == len(scaled)
        for one, other in zip(plain, scaled, strict=True):
            assert one["lr"] is other["lr"]
            assert {k: v for k, v in one.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
            assert [name for name, _ in one["params"]] == [name for name, _ in other["params"]]
        scaling.initialize(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_tied_head_is_divided_in_the_final_norm(kind):
    """Logits of the same vectors before the norm are those of an untied head a quarter as large."""
    torch.manual_seed(0)
    model = model_of(kind, 128, "cpu", tie_word_embeddings=True)
    norm = model.model.norm if kind == "llama" else model.transformer.ln_f
    hidden = torch.randn(1, 3, 128)
    before, embedding = model.lm_head(norm(hidden)), model.get_input_embeddings().weight.clone()
    Scaling(base=config(kind, tie_word_embeddings=True)).initialize(model)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    torch.testing.assert_close(model.lm_head(norm(hidden)), before / 4)
    found = factors(model, config(kind, tie_word_embeddings=True))
    embedding = "embed_tokens" if kind == "llama" else "wte"
    assert pick(found, embedding) == ("tied embedding", 1, 1, 1 / 4)
    assert pick(found, "model.norm" if kind == "llama" else "ln_f") == ("final norm", 1 / 4, 1 / 4, 0)


def test_a_saved_model_gives_the_same_logits_without_any_multiplier(tmp_path):
    torch.manual_seed(0)
    tokens = torch.arange(24).view(2, 12)
    for tied in (False, True):
        model = model_of("llama", 64, "cpu", tie_word_embeddings=tied)
        scaling = Scaling(base=config(tie_word_embeddings=tied))
        scaling.initialize(model)
        optimizer = Muon8bit(param_groups(model, lr=1e-2, scaling=scaling), lr=1e-2)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        logits = model(tokens).logits
        model.save_pretrained(tmp_path / str(tied))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied))
        assert torch.equal(loaded(tokens).logits, logits)
        assert not {"multiplier", "mup", "scaling"} & set("_".join(loaded.config.to_dict()).split("_"))


def test_initialization_has_the_standard_deviations_of_the_rule():
    torch.manual_seed(0)
    model = model_of(width=256, device="cpu")
    Scaling(base=config()).initialize(model)
    sd = {name: p.std().item() for name, p in model.named_parameters()}
    for name, expected in {"embed_tokens": 0.02, "q_proj": 0.02 / 8**0.5, "down_proj": 0.02 / 8**0.5}.items():
        assert all(value == pytest.approx(expected, rel=0.03) for key, value in sd.items() if name in key)
    assert sd["lm_head.weight"] == pytest.approx(0.02 / 8, rel=0.03)


def test_torchs_own_initialization_already_follows_the_inputs():
    def net(width):
        return nn.Sequential(nn.Embedding(50, width), nn.Linear(width, 2 * width), nn.Linear(2 * width, 50))

    torch.manual_seed(0)
    model, base = net(256), net(32)
    before = {name: p.std().item() for name, p in model.named_parameters()}
    Scaling(base=base).initialize(model)
    ratio = {name: p.std().item() / before[name] for name, p in model.named_parameters()}
    assert ratio["1.weight"] == pytest.approx(1, rel=1e-6)  # 1 / sqrt(inputs), as it was
    assert ratio["2.weight"] == pytest.approx(1 / 8**0.5, rel=1e-5)  # 1 / inputs in all
    assert ratio["0.weight"] == ratio["1.bias"] == 1


def test_a_steps_change_of_hidden_vectors_does_not_depend_on_the_width():
    """One step of Muon on a hidden matrix, whatever adjust_lr_fn multiplies: |dW x| / |x| of a top direction."""
    changes = []
    for adjust in ("match_rms_adamw", "original", "spectral"):
        for width in (64, 256):
            torch.manual_seed(0)
            names = ("0.weight", "1.weight", "2.weight")
            base = dict(zip(names, [(9, 64), (128, 64), (9, 128)], strict=True))
            model = nn.Sequential(nn.Embedding(9, width), nn.Linear(width, 2 * width, False))
            model.append(nn.Linear(2 * width, 9, False))
            rate = {"match_rms_adamw": 1.0, "original": 0.2 * 128**0.5 / 2**0.5, "spectral": 0.2 * 128**0.5 / 2**0.5}
            groups = param_groups(
                model, lr=rate[adjust], adamw_lr=1.0, adjust_lr_fn=adjust, weight_decay=0.0, scaling=Scaling(base=base)
            )
            optimizer = Muon8bit(groups, lr=1.0, adjust_lr_fn=adjust, bits=32)
            before, direction = model[1].weight.detach().clone(), torch.randn(width)
            (model[1](direction) @ torch.randn(2 * width)).backward()
            optimizer.step()
            change = (model[1].weight.detach() - before) @ direction
            changes.append((change.norm() / math.sqrt(2 * width) / (direction.norm() / math.sqrt(width))).item())
    assert max(changes) / min(changes) < 1.02, changes


def test_the_table_shows_roles_and_factors():
    scaling = Scaling(base=config())
    text = str(param_groups(model_of(width=128), lr=1e-2, scaling=scaling))
    assert "role: init, lr, decay x" in text
    assert "hidden: 0.5, 0.5, 0.5" in text
    assert "head: 0.25, 0.25, 1" in text
    assert "role" not in str(param_groups(model_of(width=128), lr=1e-2))


def test_a_users_roles_and_rates_come_first():
    model = nn.Sequential(nn.Embedding(9, 32), nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 9))
    base = {n: tuple(s // 2 if s != 9 else s for s in p.shape) for n, p in model.named_parameters()}
    assert factors(model, base, roles=[("2.weight", "head")])["2.weight"][:2] == ("head", 0.5)
    with pytest.raises(ValueError, match=r"pattern '5\.\*' matches no parameter"):
        factors(model, base, roles=[("5.*", "head")])
    groups = param_groups(model, lr=1.0, scaling=Scaling(base=base), patterns=[("1.weight", {"lr": 0.3})])
    (own,) = [group for group in groups if [name for name, _ in group["params"]] == ["1.weight"]]
    assert (own["lr"], own["weight_decay"]) == (0.3, pytest.approx(0.1 / 2))


class _AddsOne(nn.Module):
    """A norm as Gemma's."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return x * (1 + self.weight)


class _AddsOneNorm(_AddsOne):
    pass


def tied_net(width, norm):
    model = nn.Sequential(nn.Embedding(9, width), nn.Linear(width, width), norm(width), nn.Linear(width, 9, False))
    model[3].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Scaling("mup", base={}), "rule must be one of .'spectral', 'essential'., not 'mup'"),
        (lambda: Scaling(base=3), "base must be a transformers configuration, a model, or a mapping"),
        (lambda: Scaling(base={"a": (3, 0)}), "'a' must have a shape"),
        (lambda: Scaling(base={}, optimizer="sgd"), "optimizer must be one of"),
        (lambda: Scaling(base={}, roles=[("a", "output")]), "a role of .'hidden', 'embedding', 'head'"),
        (lambda: config("gpt2"), "no module of the LlamaForCausalLM has a GPT2Config"),
        (lambda: config(num_hidden_layers=3), "it has the parameter model.layers.2.*only the width may differ"),
        (lambda: config(num_hidden_layers=1), "it has no parameter model.layers.1"),
        (lambda: {**_shapes(), "model.norm.weight": (3, 3)}, "model.norm.weight has the shape .3, 3. there"),
        (lambda: config(vocab_size=50), r"embed_tokens.weight has 50 rows there and 99 here.* no width.*vocabulary"),
        (lambda: config(width=64, vocab_size=50), "embed_tokens.weight has 50 rows there and 99 here"),
        (lambda: config(vocab_size=50, tie_word_embeddings=True), "embed_tokens.weight has 50 rows there and 99 here"),
        (lambda: {**_shapes(), "lm_head.weight": (50, 32)}, "lm_head.weight has 50 rows there and 99 here"),
    ],
)
def test_a_base_rule_or_role_that_does_not_fit_is_refused(make, words):
    def use():
        made = make()
        scaling = made if isinstance(made, Scaling) else Scaling(base=made)
        param_groups(model_of(width=64), lr=1.0, scaling=scaling)

    with pytest.raises((ValueError, TypeError), match=words):
        use()


def _shapes():
    return {name: tuple(param.shape) for name, param in model_of().named_parameters()}


def test_parameters_without_a_role_or_a_rate_are_refused_by_name():
    def refused(model, words, base=None, **more):
        base = base or {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
        with pytest.raises(ValueError, match=words):
            param_groups(model, lr=1.0, scaling=Scaling(base=base), **more)

    net = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9))
    net.odd = nn.Parameter(torch.zeros(2, 3, 8))
    refused(net, r"knows no role for odd of shape .*roles=\[\('odd', role\)\], one of hidden, embedding, head")
    refused(
        nn.Sequential(*net),
        "0.weight goes to Muon, and the rule has no rate for its role, embedding",
        patterns=[("0.weight", "muon")],
    )
    refused(tied_net(8, nn.Identity), "0.weight is embedding and head, .* no norm before the head was found")
    refused(tied_net(8, _AddsOneNorm), "the weight of 2, which would take the head's factor, does not multiply")
    with pytest.raises(ValueError, match=r"odd is on the meta device|0.weight is on the meta device"):
        Scaling(base=net).initialize(nn.Sequential(*net).to("meta"))
    with pytest.raises(TypeError, match=r"scaling must be None or a muon8bit.Scaling, not 'spectral'"):
        param_groups(net, lr=1.0, scaling="spectral")


def scaled_groups(optimizer, adjust="match_rms_adamw"):
    scaling = Scaling(base=config(width=16), optimizer=optimizer)
    model = model_of(device="cpu")
    return param_groups(model, lr=1e-3, adamw_lr=1e-3, adjust_lr_fn=adjust, scaling=scaling)


ADAMUON_KEYS = {"second_moment": "element", "rescale": "rms", "sign_momentum": True}
MAKE = {
    "muon8bit": Muon8bit,
    "normuon8bit": NorMuon8bit,
    "adamuon8bit": AdaMuon8bit,
    "adamuon8bit by keys": lambda groups: Muon8bit(groups, **ADAMUON_KEYS),
}


@pytest.mark.parametrize("made", MAKE)
@pytest.mark.parametrize("asked", ["muon8bit", "normuon8bit", "adamuon8bit", "adamw"])
def test_groups_scaled_for_one_update_rule_are_refused_by_another(asked, made):
    """The rates in the groups fit the update of the rule's optimizer alone."""
    groups, rule = scaled_groups(asked), made.split()[0]
    if asked == rule:
        optimizer = MAKE[made](groups)
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(optimizer.state_dict())
        assert rates == [group["lr"] for group in groups] == [group["lr"] for group in optimizer.param_groups]
        return
    words = rf"group 0: .* scaled for '{asked}', .* that of '{rule}'.*\.Scaling\(\.\.\., optimizer='{rule}'\)"
    with pytest.raises(ValueError, match=words):
        MAKE[made](groups)
    optimizer = MAKE[made](param_groups(model_of(device="cpu"), lr=1e-3))
    num_groups, late = len(optimizer.param_groups), scaled_groups(asked)[0]
    late["params"] = [(f"late.{name}", param) for name, param in late["params"]]
    with pytest.raises(ValueError, match=rf"group {num_groups}: .* scaled for '{asked}'"):
        optimizer.add_param_group(late)
    assert len(optimizer.param_groups) == num_groups


def test_groups_scaled_for_another_factor_of_the_shape_are_refused():
    """NorMuon's paper gives every matrix an RMS of 0.2, whatever adjust_lr_fn says; its official code does not."""
    with pytest.raises(ValueError, match=r"scaled for adjust_lr_fn='original', .*'match_rms_adamw': build them by"):
        NorMuon8bit(scaled_groups("normuon8bit", "original"))
    NorMuon8bit(scaled_groups("normuon8bit", "original"), preset="official")
    NorMuon8bit(scaled_groups("normuon8bit", "spectral"), preset="dion")
    group = scaled_groups("muon8bit")[0]
    with pytest.raises(ValueError, match=r"scaled for adjust_lr_fn='match_rms_adamw', .*'spectral'"):
        Muon8bit([{**group, "adjust_lr_fn": "spectral"}])
    Muon8bit([{**scaled_groups("muon8bit", None)[0], "adjust_lr_fn": "original"}])  # None means it


def test_what_groups_are_scaled_for_is_no_part_of_a_checkpoint():
    """So those that were saved before groups said it continue, and an older version reads the new ones."""
    groups = scaled_groups("muon8bit")
    before = Muon8bit([{key: value for key, value in group.items() if key != "scaled_for"} for group in groups])
    now = Muon8bit(groups)
    assert now.state_dict() == before.state_dict()
    assert groups[0]["scaled_for"] == ("muon8bit", "match_rms_adamw")  # for the next optimizer
    now.load_state_dict(before.state_dict())
    at_base = param_groups(model_of(width=16), lr=1e-3, scaling=Scaling(base=config(width=16)))
    assert not any("scaled_for" in group for group in at_base)
    with pytest.raises(ValueError, match="group 0: scaled_for is 'adamuon8bit'; it must be"):
        Muon8bit([{**groups[0], "scaled_for": "adamuon8bit"}])


def test_an_adapter_is_refused_by_name():
    """Names as peft makes them."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9))
    model[1] = nn.ModuleDict({"base_layer": model[1], "lora_A": nn.ModuleDict({"default": nn.Linear(8, 2, False)})})
    with pytest.raises(ValueError, match=r"1.lora_A.default.weight is part of an adapter"):
        param_groups(model, lr=1.0, scaling=Scaling(base=model))


def test_names_of_a_wrapped_model_are_those_of_its_base():
    model = nn.DataParallel(model_of(width=64))
    assert pick(factors(model, config()), "lm_head")[0] == "head"
    assert muon8bit.Scaling is Scaling
