"""A patch changes one instance, which can be undone, copied, pickled, hooked, compiled, moved."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from ueo_fast import freeze_all_but_affine
from ueo_fast.patch import unpatch

open_clip = pytest.importorskip("open_clip")

from open_clip.modified_resnet import Bottleneck  # noqa: E402
from patch_models import gradients, images, patch_all, tower  # noqa: E402

CONTIGUOUS = torch.contiguous_format


def small() -> nn.Module:
    return tower("RN50", 32, layers=[1, 1, 1, 1], width=16)


def block() -> nn.Module:
    from patch_models import perturbed

    torch.manual_seed(0)
    return perturbed(Bottleneck(16, 4))


def feature_map() -> torch.Tensor:
    return torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))


def classes(model: nn.Module) -> list[str]:
    """Names of classes; a patched class equals its original."""
    return [f"{type(module).__module__}.{type(module).__name__}" for module in model.modules()]


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4, msg=name)


def test_parameters_names_and_types_stay():
    model = small()
    before, types = classes(model), [type(module) for module in model.modules()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    keys = list(model.state_dict())
    handle = patch_all(model)
    assert list(model.state_dict()) == keys
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor for name, tensor in tensors.items())
    for module, original in zip(model.modules(), types, strict=True):
        assert isinstance(module, original)
    assert classes(model) != before
    handle.undo()
    assert classes(model) == before
    handle.undo()  # nothing is left to do
    assert classes(model) == before


def test_other_instances_are_untouched():
    one, other = small(), small()
    before = classes(other)
    patch_all(one)
    assert classes(other) == before
    assert type(nn.Conv2d(1, 1, 1)) is nn.Conv2d


def test_context_manager_undoes_even_after_an_error():
    model = small()
    before = classes(model)
    with pytest.raises(RuntimeError, match="channels"), patch_all(model):
        model(torch.zeros(1, 4, 32, 32))
    assert classes(model) == before
    with patch_all(model) as handle:
        assert handle.report.patched
        assert classes(model) != before
    assert classes(model) == before


def test_patching_twice_says_so_and_changes_nothing():
    model = small()
    first = patch_all(model)
    patched = classes(model)
    second = patch_all(model)
    assert classes(model) == patched
    assert {site.reason for site in second.report.sites} == {"already patched"}
    second.undo()
    assert classes(model) == patched
    first.undo()
    assert classes(model) != patched


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_patched_and_independent(way):
    model = small()
    freeze_all_but_affine(model)
    before = classes(model)
    patch_all(model)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert classes(twin) == classes(model)
    x = images(2, 32, CONTIGUOUS)
    assert_close(gradients(twin, x), gradients(model, x))
    unpatch(twin)
    assert classes(twin) == before
    assert classes(model) != before


def test_a_handle_copied_with_its_model_undoes_the_copy():
    model = small()
    before = classes(model)
    handle = patch_all(model)
    twin, twins_handle = copy.deepcopy((model, handle))
    twins_handle.undo()
    assert classes(twin) == before
    assert classes(model) != before


def test_state_dicts_pass_both_ways():
    plain, model = small(), small()
    patch_all(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("watched", ["bn1", "act1", "bn3", "act3", "conv3"])
def test_hooks_see_what_they_saw(watched):
    """A chain that would bypass a hook is not fused, also if the hook is registered later."""
    eager = block()
    before, after = copy.deepcopy(eager), copy.deepcopy(eager)
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str, model: nn.Module) -> None:
        module = model.get_submodule(watched)
        module.register_forward_hook(lambda m, a, out: seen.setdefault(name, []).append(out + 0))
        if watched == "conv3":  # PyTorch allows none where what follows works in place
            module.register_full_backward_hook(lambda m, i, o: seen[name].append(o[0]))

    watch("eager", eager)
    watch("before", before)
    report = patch_all(before).report
    patch_all(after)
    watch("after", after)
    if watched != "conv3":
        (site,) = [s for s in report.sites if s.name == f"bn{watched[-1]}"]
        assert "has hooks" in site.reason
    for name, model in (("eager", eager), ("before", before), ("after", after)):
        model(feature_map().requires_grad_()).square().sum().backward()
        assert len(seen[name]) == (2 if watched == "conv3" else 1)
        for ours, theirs in zip(seen[name], seen["eager"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_hooks_on_all_modules_see_every_module():
    model = block()
    patch_all(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: seen.append(m))
    try:
        model(feature_map())
    finally:
        handle.remove()
    assert {model.bn1, model.act1, model.bn3, model.act3} <= set(seen)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tower_name", ["RN50", "ViT-B-32"])
def test_compiled_as_one_graph(tower_name, backend):
    vision = {"layers": [1, 1, 1, 1]} if tower_name == "RN50" else {"layers": 1}
    model = tower(tower_name, 32, width=16 if tower_name == "RN50" else 64, **vision)
    freeze_all_but_affine(model)
    x = images(2, 32, CONTIGUOUS)
    expected = gradients(model, x)
    patch_all(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = gradients(compiled, x)
    assert_close({k.removeprefix("_orig_mod."): v for k, v in found.items()}, expected)


def test_moving_and_casting():
    model = small()
    patch_all(model)
    x = images(2, 32, CONTIGUOUS)
    assert model.double()(x.double()).dtype == torch.float64
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert model.to("meta")(x.to("meta")).shape == (2, 1024)


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])
def test_on_the_meta_device_it_has_the_shapes_of_the_original(name):
    model = small() if name == "RN50" else tower(name, 32, layers=1, width=64)
    model = model.to_empty(device="meta")
    x = torch.empty(2, 3, 32, 32, device="meta", requires_grad=True)
    wanted = model(x).shape
    patch_all(model)
    y = model(x)
    y.sum().backward()
    assert y.is_meta
    assert (y.shape, x.grad.shape) == (wanted, x.shape)


def test_frozen_or_trained_is_seen_in_every_call():
    eager = small()
    model = copy.deepcopy(eager)
    patch_all(model)
    x = images(2, 32, CONTIGUOUS)
    for frozen in (False, True, False):
        for m in (eager, model):
            m.requires_grad_(not frozen)
            m.bn1.weight.requires_grad_()
        assert_close(gradients(model, x), gradients(eager, x))


def test_functional_transforms():
    eager = block()
    model = copy.deepcopy(eager)
    patch_all(model)
    x = feature_map()

    def gradient(module):
        def loss(parameters):
            return torch.func.functional_call(module, parameters, (x,)).sin().sum()

        return torch.func.grad(loss)(dict(module.named_parameters()))

    assert_close(gradient(model), gradient(eager))


def test_traced_modules_are_made_of_ordinary_operations():
    model = block()
    patch_all(model)
    traced = torch.jit.trace(model, feature_map())
    torch.testing.assert_close(traced(feature_map()), model(feature_map()), rtol=1e-4, atol=1e-5)
    assert "Function" not in str(traced.inlined_graph)
    assert "ueo_fast::" not in str(traced.inlined_graph)


def resnet() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    from patch_models import perturbed

    torch.manual_seed(0)
    return freeze(perturbed(torchvision.models.resnet18(weights=None)))


def freeze(model: nn.Module) -> nn.Module:
    freeze_all_but_affine(model)
    return model


def photographs() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_torch_fx_records_the_originals():
    model = resnet()
    patched = copy.deepcopy(model)
    patch_all(patched)
    graph, expected = torch.fx.symbolic_trace(patched), torch.fx.symbolic_trace(model)
    assert [(n.op, str(n.target)) for n in graph.graph.nodes] == [
        (n.op, str(n.target)) for n in expected.graph.nodes
    ]
    x = photographs()
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)
    unpatch(graph)
    assert torch.equal(graph(x), model(x))


class NoLeaves(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return False


@pytest.mark.parametrize("name", ["timm", "one of each"])
def test_torch_fx_without_leaves(name):
    """``nn.BatchNorm2d`` itself cannot be traced this way."""
    x = photographs()
    if name == "timm":
        layers = pytest.importorskip("timm.layers")
        model = freeze(nn.Sequential(layers.BatchNormAct2d(3), nn.Conv2d(3, 4, 3)).eval())
    else:
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding="same"),
            nn.Conv2d(8, 8, 2, padding=1, padding_mode="reflect"),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 32, 1, bias=False),
            nn.AdaptiveAvgPool2d((3, 3)),
            nn.Flatten(2),
            nn.LayerNorm(9),
        ).eval()
        freeze(model)
    expected = model(x)
    patch_all(model)
    graph = torch.fx.GraphModule(model, NoLeaves().trace(model))
    torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-5)
    assert not any("ueo_fast" in str(node.target) for node in graph.graph.nodes)


def test_feature_extraction_of_torchvision():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = resnet(), photographs()
    names = {"layer1.0.relu": "a", "layer2.0.downsample": "b", "layer3": "c"}
    expected = extraction.create_feature_extractor(copy.deepcopy(model), names)(x)
    patch_all(model)
    extractor = extraction.create_feature_extractor(model, names)
    assert_close(extractor(x), expected)
    extractor(x.requires_grad_())["c"].sum().backward()
    assert all(p.grad is not None for n, p in extractor.named_parameters() if "layer3.0.bn1" in n)


def test_feature_extraction_of_timm():
    timm = pytest.importorskip("timm")
    options = {"features_only": True, "pretrained": False}
    for name, more in (
        ("resnet18", {"feature_cls": "fx"}),
        ("resnet18", {}),
        ("convnext_atto", {}),
    ):
        torch.manual_seed(0)
        model = freeze(timm.create_model(name, **options, **more).eval())
        x = photographs()
        expected = model(x)
        patch_all(model)
        for ours, true in zip(model(x), expected, strict=True):
            torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)
    extract = timm.models.create_feature_extractor  # of a model that is patched already
    torch.manual_seed(0)
    model = freeze(timm.create_model("resnet18", pretrained=False).eval())
    expected = extract(copy.deepcopy(model), ["layer2"])(x)["layer2"]
    patch_all(model)
    torch.testing.assert_close(extract(model, ["layer2"])(x)["layer2"], expected)


def quantised(model: nn.Module, x: torch.Tensor) -> nn.Module:
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping(), (x,))
    prepared(x)
    return quantize_fx.convert_fx(prepared)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_fusion_and_quantisation_find_patched_layers():
    quantization = pytest.importorskip("torch.ao.quantization")
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    model, x = resnet(), photographs()
    patched = copy.deepcopy(model)
    patch_all(patched)

    def in_place(network):
        names = [["conv1", "bn1", "relu"], ["layer1.0.conv1", "layer1.0.bn1"]]
        return quantization.fuse_modules(network, names)

    for change in (
        in_place,
        quantize_fx.fuse_fx,
        functools.partial(quantised, x=x),
    ):
        found, expected = change(copy.deepcopy(patched)), change(copy.deepcopy(model))
        torch.testing.assert_close(found(x), expected(x), rtol=1e-5, atol=1e-5)
        kinds = [name.replace("Patched", "") for name in classes(found)]
        assert kinds == classes(expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripting_fails_while_patched_and_works_after_undo():
    model, x = resnet(), photographs()
    expected = torch.jit.script(copy.deepcopy(model))(x)
    handle = patch_all(model)
    with pytest.raises(Exception, match=r"(?i)script|compil|support|type|closed over|unknown"):
        torch.jit.script(model)
    handle.undo()
    assert torch.equal(torch.jit.script(model)(x), expected)


def test_a_patched_class_equals_its_original_and_no_other():
    first, second = nn.BatchNorm2d(2), nn.BatchNorm1d(2)
    model = nn.Sequential(first, second)
    patch_all(model)
    assert {nn.BatchNorm2d: "2d", nn.BatchNorm1d: "1d"}[type(first)] == "2d"
    assert len({type(first), nn.BatchNorm2d, type(second), nn.BatchNorm1d}) == 2
    assert type(first) is not nn.BatchNorm2d


def test_a_parametrised_module_stays_patched_and_undo_says_so():
    model = block()
    handle = patch_all(model)
    parametrizations.weight_norm(model.conv1)
    with pytest.warns(UserWarning, match=r"1 patched modules stay.*ParametrizedPatchedConv2d"):
        handle.undo()
    assert type(model.conv2) is nn.Conv2d


def _train(rank: int, where: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{where}/rendezvous", rank=rank, world_size=2
    )
    try:
        model = small()
        freeze_all_but_affine(model)
        patch_all(model)
        parallel = DistributedDataParallel(model)
        x = images(4, 32, CONTIGUOUS)[2 * rank : 2 * rank + 2]
        parallel(x).square().sum().backward()
        if rank == 0:
            found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            torch.save(found, f"{where}/gradients.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
def test_two_processes_average_their_gradients(tmp_path: Path):
    torch.multiprocessing.spawn(_train, (str(tmp_path),), nprocs=2)
    model = small()
    freeze_all_but_affine(model)
    model(images(4, 32, CONTIGUOUS)).square().sum().backward()
    found = torch.load(tmp_path / "gradients.pt")
    expected = {n: p.grad / 2 for n, p in model.named_parameters() if p.grad is not None}
    assert_close(found, expected)


@pytest.mark.parametrize("model", [None, "RN50", torch.zeros(1)])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got"):
        patch_all(model)
