"""Heads, tables, latents, routers, experts and adapters by kind, in models of one's own and of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from helpers import routing_models
from torch import nn

from muon8bit import param_groups
from muon8bit.routing.groups import Route


def routes_of(make: Callable[[], nn.Module], **options: Any) -> dict[str, Route]:
    with torch.device("meta"):
        return {route.name: route for route in param_groups(make(), lr=1e-3, **options).routes}


def hidden(size: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))


class Model(nn.Module):
    """A hidden block, and the parts given by name; `config` counts a vocabulary of 40 and 5 labels."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.config = hf.PretrainedConfig(vocab_size=40, num_labels=5, codebook_size=24)
        self.embed = nn.Embedding(40, 16)
        self.block = hidden()
        for name, part in parts.items():
            setattr(self, name, part)


def listed(rows: int) -> nn.Module:
    return nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, rows)) for _ in range(2))


HEADS: dict[str, Callable[[], Any]] = {
    "speculator_heads": lambda: listed(40),
    "extra": lambda: listed(40),
    "fc": lambda: nn.Linear(16, 7),
    "mlp_head": lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 7)),
    "to_logits": lambda: nn.Linear(16, 7),
    "cls": lambda: nn.Linear(16, 5),
    "value": lambda: nn.Linear(16, 1),
    "project": lambda: nn.Linear(16, 24),
    "output": lambda: nn.Linear(16, 40),
    "score_head": lambda: nn.Linear(16, 3),
    "final_layer": lambda: nn.ModuleDict({"adaLN_modulation": nn.Linear(16, 32), "linear": nn.Linear(16, 9)}),
}


@pytest.mark.parametrize("name", HEADS)
def test_outputs_of_any_name_go_to_adamw_and_what_leads_to_them_to_muon(name: str) -> None:
    routes = routes_of(lambda: Model(**{name: HEADS[name](), "tail": hidden()}))
    matrices = [r for r in routes.values() if r.name.startswith(name) and len(r.shape) == 2]
    last = max(matrices, key=lambda r: r.name)
    assert last.algorithm == "adamw"
    assert all(r.algorithm == "muon" for r in matrices if r.shape == (16, 16))
    assert {routes[f"block.{i}.weight"].algorithm for i in (0, 2)} == {"muon"}


class Policy(hf.PreTrainedModel):
    """A model of transformers whose inputs have the size of its output; `parts` as they are run."""

    config_class = hf.PretrainedConfig

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__(hf.PretrainedConfig(vocab_size=40, num_labels=5))
        self.embed_actions = nn.ModuleDict({"action_in_proj": nn.Linear(8, 16), "time_mlp_out": nn.Linear(16, 16)})
        self.block = hidden()
        for name, part in parts.items():
            setattr(self, name, part)


def lora(model: nn.Module) -> nn.Module:
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["time_mlp_out"]))  # type: ignore[arg-type]
    return wrapped.requires_grad_(True)


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["plain", "peft"])
def test_at_the_top_of_a_model_of_transformers_only_what_comes_later_takes_an_output(wrap: Any) -> None:
    named = routes_of(lambda: wrap(Policy(action_out_proj=nn.Linear(16, 8))))
    (out,) = (route for name, route in named.items() if "action_out_proj" in name and len(route.shape) == 2)
    assert out.algorithm == "adamw"
    assert {r.algorithm for n, r in named.items() if "embed_actions" in n and "weight" in n} == {"muon"}
    unnamed = routes_of(lambda: wrap(Policy(project_hid=nn.Linear(16, 8), speaker=nn.Linear(16, 8))))
    flagged = {name.split(".")[-2] for name, route in unnamed.items() if "head" in route.flag}
    assert flagged == {"project_hid", "speaker"}


def own(**parts: Any) -> nn.Module:
    """Modules in a module that no model of transformers is around."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def attention() -> nn.Module:
    to_out = nn.Sequential(nn.Linear(16, 16), nn.Dropout())
    return own(to_q=nn.Linear(16, 16), to_k=nn.Linear(16, 16), to_v=nn.Linear(16, 16), to_out=to_out)


def test_the_last_linear_is_no_head_inside_attention_or_behind_another_head() -> None:
    unet = routes_of(lambda: own(down=nn.Conv2d(3, 16, 3), mid_attn=attention(), up=nn.Conv2d(16, 3, 1)))
    assert {r.algorithm for n, r in unet.items() if "attn" in n and "weight" in n} == {"muon"}
    policy = {"action_in_proj": nn.Linear(7, 16), "action_out_proj": nn.Linear(16, 7)}
    robot = routes_of(lambda: own(block=hidden(), **policy, action_time_mlp_out=nn.Linear(16, 16)))
    assert [robot[f"action_{n}.weight"].algorithm for n in ("out_proj", "time_mlp_out")] == ["adamw", "muon"]


def test_a_value_at_the_top_is_a_head_unless_a_query_is_beside_it() -> None:
    assert routes_of(lambda: own(body=hidden(), value=nn.Linear(16, 4), critic=nn.Linear(16, 1)))[
        "value.weight"
    ].algorithm == ("adamw")
    projections = {name: nn.Linear(16, 16) for name in ("query", "key", "value")}
    assert {r.algorithm for r in routes_of(lambda: own(**projections)).values() if len(r.shape) > 1} == {"muon"}


def test_an_adaptive_softmax_is_a_head() -> None:
    routes = routes_of(lambda: Model(loss=nn.AdaptiveLogSoftmaxWithLoss(16, 40, [10, 20])))
    assert {r.algorithm for name, r in routes.items() if name.startswith("loss.")} == {"adamw"}


def test_outputs_that_a_score_or_a_feedback_takes_go_to_adamw() -> None:
    summary = nn.ModuleDict({"summary": nn.Linear(16, 5)})
    assert (
        routes_of(lambda: Policy(pool=summary, logits_proj=nn.Linear(5, 1)))["pool.summary.weight"].algorithm == "adamw"
    )
    assert (
        routes_of(lambda: Policy(out=nn.Linear(16, 40), out_mid=nn.Linear(40, 16)))["out.weight"].algorithm == "adamw"
    )


def test_hidden_matrices_of_as_many_rows_as_the_vocabulary_stay_with_muon() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)
            self.k_proj, self.o_proj = nn.Linear(16, 24), nn.Linear(16, 16)

    routes = routes_of(lambda: Model(layers=nn.ModuleList([Block(), Block()]), head=nn.Linear(16, 40)))
    assert {r.algorithm for r in routes.values() if "layers." in r.name and len(r.shape) == 2} == {"muon"}
    assert routes["head.weight"].algorithm == "adamw"


@pytest.mark.parametrize("last", [nn.Linear(16, 16), nn.Linear(16, 9)])
def test_last_linear_without_a_telling_name_is_flagged_also_behind_an_embedding(last: nn.Module) -> None:
    route = routes_of(lambda: Model(step=last))["step.weight"]
    assert (route.algorithm, "head" in route.flag) == ("muon", True)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *[("pos_embed", (9, 16)), ("position_embeddings", (1, 9, 16)), ("relative_position_bias_table", (9, 4))],
        *[("latents", (9, 16)), ("query_tokens", (1, 9, 16)), ("mask_token", (1, 1, 16)), ("bias_u", (4, 4))],
        *[("D", (2, 16)), ("A_log", (16, 4)), ("layer_scale_1", (16, 1, 1)), ("rel_pos_h", (9, 4)), ("gamma", (2, 16))],
        *[("row_embed", (9, 16)), ("temporal_embed", (1, 9, 16)), ("registers", (4, 16)), ("null_kv", (2, 4, 8))],
        *[("inducing_points", (9, 16)), ("centroids", (9, 16)), ("h0", (2, 16)), ("log_dt", (4, 8)), ("ctx", (9, 16))],
        *[("emb_rel_k", (1, 9, 16)), ("relative_keys_embed", (9, 16)), ("label_embeddings_concat", (9, 16))],
    ],
)
def test_tables_latents_and_state_space_parameters_do_not_decay(name: str, shape: tuple[int, ...]) -> None:
    def make() -> nn.Module:
        return Model(**{name: nn.Parameter(torch.zeros(shape))})

    route = routes_of(make)[name]
    assert (route.algorithm, route.decays) == ("adamw", False)
    assert routes_of(make, patterns=[(name, "muon")])[name].algorithm == "muon"


def test_bare_parameter_is_flagged_and_goes_where_a_pattern_says() -> None:
    def make() -> nn.Module:
        return Model(mixing=nn.Parameter(torch.zeros(16, 16)))

    route = routes_of(make)["mixing"]
    assert (route.algorithm, route.decays, "pattern" in route.flag) == ("adamw", True, True)
    assert routes_of(make, patterns=[("mixing", "muon")])["mixing"].algorithm == "muon"


def test_a_linear_whose_class_is_called_norm_is_a_matrix() -> None:
    class NormedLinear(nn.Linear):
        pass

    class HeadNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

    routes = routes_of(lambda: Model(mid=NormedLinear(16, 16), q_norm=HeadNorm()))
    assert routes["mid.weight"].algorithm == "muon"
    assert (routes["q_norm.weight"].algorithm, routes["q_norm.weight"].decays) == ("adamw", False)


class Mixture(nn.Module):
    """Experts of three layouts, none called `experts`, and a router that is called `switch`."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.zeros(4, 24, 16)), nn.Parameter(torch.zeros(4, 16, 24))
        self.switch = nn.Linear(16, 4)
        self.table = nn.Parameter(torch.zeros(3, 5, 6))


def test_stacks_are_found_by_siblings_and_a_router() -> None:
    routes = routes_of(lambda: Model(mix=Mixture()))
    assert {n: routes[f"mix.{n}"].algorithm for n in ("w_in", "w_out", "table", "switch.weight")} == {
        "switch.weight": "adamw",
        "w_in": "muon",
        "w_out": "muon",
        "table": "adamw",
    }


@pytest.mark.parametrize("name", ["gate_proj", "switch", "dispatcher", "gating", "expert_gate"])
@pytest.mark.parametrize("of_layers", [False, True])
def test_what_scores_the_experts_beside_it_is_a_router_by_any_name(name: str, of_layers: bool) -> None:
    layers = [nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)]
    router = nn.Sequential(*layers) if of_layers else nn.Linear(16, 4)
    experts = nn.ModuleList(own(gate_proj=nn.Linear(16, 24), down_proj=nn.Linear(24, 16)) for _ in range(4))
    moe = own(**{name: router}, experts=experts, proj=nn.Linear(16, 16))
    routes = routes_of(lambda: Model(layers=nn.ModuleList([own(moe=moe)]), head=nn.Linear(16, 40)))
    kinds: dict[str, set[Any]] = {"adamw": set(), "muon": set()}
    for path, route in routes.items():
        if path.startswith("layers") and len(route.shape) > 1:
            kinds[str(route.algorithm)].add(path.split(".")[3])
    assert kinds == {"adamw": {name}, "muon": {"experts", "proj"}}


def test_stacks_beside_a_bare_router_are_experts() -> None:
    def make(router: str, around: str) -> nn.Module:
        shapes = {router: (16, 4), "up": (4, 16, 24), "down": (4, 24, 16)}
        parts = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        return Model(layers=nn.ModuleList([own(**{around: own(**parts)})]))

    for router, around in (("router", "ffn"), ("phi", "moe")):
        routes = routes_of(lambda router=router, around=around: make(router, around))
        found = [routes[f"layers.0.{around}.{name}"].algorithm for name in (router, "up", "down")]
        assert found == ["adamw", "muon", "muon"]


@pytest.mark.parametrize("name", ["query_embed", "latent_embeddings", "row_embed", "pos_emb"])
def test_tables_of_queries_and_of_positions_do_not_decay(name: str) -> None:
    routes = routes_of(lambda: Model(**{name: nn.Embedding(9, 16)}))
    assert (routes[f"{name}.weight"].decays, routes["embed.weight"].decays) == (False, True)


def test_gate_and_up_of_parallel_experts_are_the_pieces_of_the_forward_pass() -> None:
    """With the gate zero, silu(0) = 0 leaves the up projection without a gradient."""
    torch.manual_seed(0)
    model = routing_models.MODELS["jetmoe"]()
    (group,) = (g for g in param_groups(model, lr=1e-3) if g.get("split_sizes"))
    ((_, weight),) = group["params"]
    with torch.no_grad():
        weight.split(group["split_sizes"], group["split_dim"])[0].zero_()
    tokens = torch.arange(3, 15)[None]
    model(tokens, labels=tokens).loss.backward()
    assert [bool(piece.any()) for piece in weight.grad.split(group["split_sizes"], group["split_dim"])] == [True, False]


def test_a_projection_of_query_and_gate_is_flagged() -> None:
    def make(rows: int) -> nn.Module:
        attention = nn.Module()
        attention.q_proj, attention.o_proj = nn.Linear(16, rows), nn.Linear(32, 16)
        return Model(layers=nn.ModuleList([attention]))

    assert "fused" in routes_of(lambda: make(64))["layers.0.q_proj.weight"].flag
    assert "fused" not in routes_of(lambda: make(32))["layers.0.q_proj.weight"].flag


TARGETS = {"target_modules": ["q_proj"]}
ADAPTERS: dict[str, tuple[Callable[[], Any], str]] = {
    "loha": (lambda: peft.LoHaConfig(r=8, **TARGETS), "muon"),
    "lokr": (lambda: peft.LoKrConfig(r=8, **TARGETS), "muon"),
    "hra": (lambda: peft.HRAConfig(r=8, **TARGETS), "adamw"),
    "oft": (lambda: peft.OFTConfig(oft_block_size=8, r=0, **TARGETS), "adamw"),
    "boft": (lambda: peft.BOFTConfig(boft_block_size=8, **TARGETS), "adamw"),
    "miss": (lambda: peft.MissConfig(r=8, **TARGETS), "adamw"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore:no matrix for Muon")
def test_adapters_other_than_lora_have_a_rule_or_a_reason(kind: str) -> None:
    config, algorithm = ADAPTERS[kind]
    model = peft.get_peft_model(routing_models.llama(), config())
    trained = [r for r in param_groups(model, lr=1e-3).routes if r.algorithm and len(r.shape) > 1]
    assert {r.algorithm for r in trained} == {algorithm}
    assert all("adapter" in r.reason or "row or column" in r.reason for r in trained)


def test_what_trains_vectors_alone_is_refused_without_talk_of_wrappers() -> None:
    for config in (peft.LNTuningConfig(task_type="CAUSAL_LM"), peft.IA3Config(feedforward_modules=[], **TARGETS)):
        model = peft.get_peft_model(routing_models.llama(), config)
        with pytest.raises(ValueError, match="no matrix for Muon") as caught:
            param_groups(model, lr=1e-3)
        assert "FSDP" not in str(caught.value)


def test_a_convolutional_network_is_warned_of_and_a_pattern_sends_its_kernels() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())

    with pytest.warns(UserWarning, match=r"no matrix for Muon.*convolution.*patterns"):
        param_groups(make(), lr=1e-3)
    assert param_groups(make(), lr=1e-3, patterns=[("0.weight", "muon")])[0]["flatten"]


class Attention(nn.Module):
    """Attention over one fused Linear, cut as timm, nanoGPT, flash-attn or a model with fewer key heads cut theirs."""

    def __init__(self, name: str, rows: int, sizes: tuple[int, ...], **said: Any) -> None:
        super().__init__()
        self.sizes = sizes
        self.add_module(name, nn.Linear(24, rows))
        self.out = nn.Linear(sizes[0], 24)
        for key, value in said.items():
            setattr(self, key, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = next(self.children())(x).split(self.sizes, -1)
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(-2, -3) for t in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(-2, -3).flatten(-2))


TOLD: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: Attention("qkv", 72, (24,) * 3, num_heads=6, head_dim=4),
    "swin": lambda: Attention("qkv", 72, (24,) * 3, dim=24, num_heads=6),
    "nanoGPT": lambda: Attention("c_attn", 72, (24,) * 3, n_head=6, n_embd=24),
    "wider": lambda: Attention("qkv", 96, (32,) * 3, num_heads=8, head_dim=4),
    "grouped": lambda: Attention("qkv", 40, (24, 8, 8), num_heads=6, num_kv_heads=2, head_dim=4),
    "grouped, by counts": lambda: Attention("Wqkv", 32, (24, 4, 4), num_heads=6, num_heads_kv=1),
    "grouped, by config": lambda: Attention(
        "qkv", 40, (24, 8, 8), config=hf.LlamaConfig(hidden_size=24, num_attention_heads=6, num_key_value_heads=2)
    ),
    "lucidrains": lambda: Attention("to_qkv", 72, (24,) * 3, heads=6),
    "torch": lambda: nn.MultiheadAttention(24, 6, batch_first=True),
    "encoder": lambda: nn.TransformerEncoderLayer(24, 6, 48, dropout=0.0, batch_first=True),
}


def fused_groups(model: nn.Module, **options: Any) -> list[tuple[str, nn.Parameter, dict[str, Any]]]:
    groups = param_groups(model, lr=1e-3, **options)
    return [(name, param, group) for group in groups if "split_sizes" in group for name, param in group["params"]]


@pytest.mark.parametrize("kind", TOLD)
def test_q_k_and_v_are_cut_where_the_forward_pass_cuts_them_by_the_modules_own_sizes(kind: str) -> None:
    """With the values zero, queries and keys have no gradient: any other border would mix them."""
    torch.manual_seed(0)
    model = TOLD[kind]()
    ((name, param, group),) = fused_groups(model)
    sizes = getattr(model, "sizes", (24,) * 3)
    assert (group["split_sizes"], group["split_dim"]) == (sizes, -2)
    bias = dict(model.named_parameters())[name.replace("weight", "bias")]
    with torch.no_grad():
        for tensor in (param, bias):
            tensor.split(sizes)[2].zero_()
    x = torch.randn(2, 5, 24)
    (model(x, x, x)[0] if kind == "torch" else model(x)).add(1).square().sum().backward()
    assert [bool(piece.any()) for piece in param.grad.split(sizes)] == [False, False, True]
    assert not any("fused" in route.flag or "result" in route.flag for route in param_groups(model, lr=1e-3).routes)
    assert not fused_groups(model, routing="0.1")


UNTOLD: dict[str, Callable[[], nn.Module]] = {
    "no size fits": lambda: Attention("qkv", 96, (32,) * 3, num_heads=6),
    "sizes that do not add up": lambda: Attention("qkv", 40, (24, 8, 8), num_heads=6, num_kv_heads=3, head_dim=4),
    "head by head": lambda: Attention("query_key_value", 72, (24,) * 3, num_heads=6, head_dim=4),
    "GPTBigCode's": lambda: Attention("c_attn", 72, (24,) * 3, num_heads=6, head_dim=4, embed_dim=24, split_size=24),
}


@pytest.mark.parametrize("kind", UNTOLD)
def test_a_layout_that_no_module_tells_is_flagged_with_the_pattern_to_paste(kind: str) -> None:
    model = nn.ModuleList([UNTOLD[kind]()])
    groups = param_groups(model, lr=1e-3)
    (route,) = [route for route in groups.routes if "fused" in route.flag]
    assert route.flag == "looks fused: orthogonalized as one matrix"
    (hint,) = [line for line in str(groups).splitlines() if "split_sizes" in line]
    pasted = hint.rpartition("patterns=")[2]
    is_told = route.shape[0] % 3 == 0
    sizes = (route.shape[0] // 3,) * 3 if is_told else "(q, k, v)"
    assert pasted == f'[("{route.name}", {{"split_sizes": {sizes}}})]'
    assert hint.startswith(
        "if these are its pieces" if is_told else f"with the sizes of its pieces, {route.shape[0]} in"
    )
    if is_told:
        ((name, _, group),) = fused_groups(model, patterns=eval(pasted))
        assert (name, group["split_sizes"]) == (route.name, sizes)


def test_gates_of_recurrent_layers_are_their_pieces() -> None:
    """At the first step from zeros nothing is kept that the forget gate of an LSTM could scale, and the reset gate of a
    GRU scales the bias of its third piece alone."""
    for layer, unused in ((nn.LSTM(8, 12), 1), (nn.GRU(8, 12), 0), (nn.LSTMCell(8, 12), 1), (nn.GRUCell(8, 12), 0)):
        for name, param in layer.named_parameters():
            if "bias" in name:
                nn.init.zeros_(param)
        found = layer(torch.randn(1, 8))[0]
        found.square().sum().backward()
        fused = {name: (param, group["split_sizes"]) for name, param, group in fused_groups(layer)}
        assert fused.keys() == {name for name, _ in layer.named_parameters() if name.startswith("weight_")}
        name = next(iter(fused))
        param, sizes = fused[name]
        assert [i for i, piece in enumerate(param.grad.split(sizes)) if not piece.any()] == [unused]
    assert not fused_groups(nn.RNN(8, 12))


def test_adapters_of_told_projections_are_cut_as_their_outputs_are() -> None:
    for model, sizes in ((TOLD["grouped"](), (24, 8, 8)), (nn.Sequential(nn.MultiheadAttention(24, 6)), (24,) * 3)):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["qkv", "0"]))
        cut = {name: group["split_sizes"] for name, _, group in fused_groups(wrapped)}
        assert list(cut.values()) == [sizes]
        assert "lora_B" in next(iter(cut))
        assert not fused_groups(wrapped, routing="0.1")


def test_what_may_be_a_head_is_flagged_with_the_pattern_to_paste() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24))
    groups = param_groups(model, lr=1e-3)
    (route,) = [route for route in groups.routes if route.flag]
    head, _, pasted = str(groups).rpartition("if it is a head: patterns=")
    assert "flagged with '!': 1 tensor;" in head
    rerouted = param_groups(model, lr=1e-3, patterns=eval(pasted))
    assert {route.name: (route.algorithm, route.flag) for route in rerouted.routes}[route.name] == ("adamw", "")
