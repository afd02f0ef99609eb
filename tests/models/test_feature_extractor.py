import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from iris_hf.errors import ConfigError
from iris_hf.models.classifier import append_classifier
from iris_hf.models.feature_extractor import make_feature_extractor_model
from iris_hf.models.hub import from_pretrained, save_pretrained
from iris_hf.models.steps import as_predictor, as_trainable

from .families import make, make_batch


class Net(nn.Module):
    """Runs `block` twice and then `head`, which counts its calls."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block(kind)
        self.head = Head()

    def forward(self, x):
        first = self.block(x)
        second = self.block(2 * as_tensor(first))
        return self.head(as_tensor(second))


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.kind = kind

    def forward(self, x):
        y = self.linear(x)
        if self.kind == "tuple":
            return None, y, x
        if self.kind == "dict":
            return {"name": "y", "features": y}
        if self.kind == "output":
            from transformers.modeling_outputs import BaseModelOutput

            return BaseModelOutput(last_hidden_state=y, hidden_states=(x,))
        return "nothing" if self.kind == "text" else y


class Head(nn.Module):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return x.relu_()


def copy_of(value):
    return value.clone() if isinstance(value, torch.Tensor) else None  # what comes later may write into it


def as_tensor(value):
    values = value.values() if isinstance(value, dict) else value
    return values if isinstance(values, torch.Tensor) else next(v for v in values if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "output"])
def test_the_first_output_of_the_module_is_what_a_hook_sees(kind):
    net = Net(kind)
    seen = []
    net.block.register_forward_hook(lambda module, inputs, output: seen.append(as_tensor(output).clone()))
    x = torch.rand(3, 4)
    net(x)
    model = make_feature_extractor_model(Net(kind), output_module_name="block")
    assert torch.equal(model.prediction_step(x), seen[0])
    assert torch.equal(as_predictor(model)(x), seen[0])


def test_nothing_runs_after_the_module_and_the_source_stays_whole():
    net, x = Net(), torch.rand(3, 4)
    expected = net(x)
    model = make_feature_extractor_model(net, output_module_name="block.linear")
    Head.calls = 0
    model(x)
    assert Head.calls == 0
    assert torch.equal(net(x), expected)
    assert Head.calls == 1
    assert not net.block.linear._forward_hooks


def test_half_a_network_takes_about_half_the_time():
    net = nn.Sequential(*(nn.Linear(600, 600) for _ in range(40)))
    model, x = make_feature_extractor_model(net, output_module_name="9"), torch.rand(200, 600)

    def seconds(function):
        times = []
        for _ in range(9):
            start = time.perf_counter()
            function(x)
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.no_grad():
        assert seconds(model) < 0.6 * seconds(net)


def test_it_is_in_the_mode_of_the_model():
    assert not make_feature_extractor_model(Net().eval()).training
    assert make_feature_extractor_model(Net()).training


def test_without_a_name_the_models_output_comes():
    net, x = Net(), torch.rand(3, 4)
    assert torch.equal(make_feature_extractor_model(net).prediction_step(x), net(x))


@pytest.mark.parametrize("name", ["timm-resnet", "timm-vit", "hf-vit", "hf-resnet", "timm-encoder", "open_clip"])
def test_every_module_of_real_models_gives_what_a_hook_sees(name):
    net = make(name).eval()
    images = torch.rand(2, 3, 64, 64) if name == "timm-encoder" else make_batch("hf-vit")[0]
    images = make_batch(name)[0] if name in ("timm-resnet", "hf-resnet") else images
    inputs = (images, torch.randint(1, 1000, (2, 77))) if name == "open_clip" else images
    seen = {}
    for path, module in net.named_modules():

        def keep(module, inputs, output, path=path):
            seen.setdefault(path, copy_of(output))

        module.register_forward_hook(keep)
    with torch.no_grad():
        net(inputs)
        clean, checked = make(name).eval(), 0
        for path in list(seen)[:: max(1, len(seen) // 12)]:
            if not path or seen[path] is None:
                continue
            features = make_feature_extractor_model(clean, output_module_name=path)(inputs)
            torch.testing.assert_close(features, seen[path])
            checked += 1
    assert checked > 5


def test_an_extractor_of_an_extractor_stops_where_it_says():
    net, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), nn.ReLU()), torch.rand(5, 4)
    inner = make_feature_extractor_model(net, output_module_name="2")
    outer = make_feature_extractor_model(inner, output_module_name="model.0")
    assert torch.equal(outer(x), net[0](x))
    assert torch.equal(pickle.loads(pickle.dumps(outer))(x), net[0](x))
    with pytest.raises(ConfigError, match=r"'model.3' does not run"):
        make_feature_extractor_model(inner, output_module_name="model.3")(x)


def test_threads_do_not_meet():
    model = make_feature_extractor_model(make("timm-resnet").eval(), output_module_name="network.network.layer2")
    batches = [torch.rand(1, 3, 64, 64) for _ in range(24)]
    with torch.no_grad():
        expected = [model(b) for b in batches]
        barrier = threading.Barrier(4)

        def run(start: int) -> list[torch.Tensor]:
            barrier.wait()
            with torch.no_grad():
                return [model(b) for b in batches[start::4]]

        with ThreadPoolExecutor(4) as pool:
            for start, features in enumerate(pool.map(run, range(4))):
                for a, b in zip(features, expected[start::4], strict=True):
                    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strict", [False, True])
def test_it_exports_to_the_part_that_is_needed(strict):
    model = make_feature_extractor_model(make("timm-resnet").eval(), output_module_name="network.network.layer2")
    x = torch.rand(2, 3, 64, 64)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    for n in (1, 2, 5):
        images = torch.rand(n, 3, 64, 64)
        torch.testing.assert_close(program.module()(images), model(images))
    assert not any("layer3" in str(node.target) for node in program.graph.nodes if node.op == "call_function")


@pytest.mark.filterwarnings("ignore")  # of an old exporter, which Optimum uses
def test_it_exports_to_onnx_by_tracing(tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = make_feature_extractor_model(make("timm-resnet").eval(), output_module_name="network.network.layer2")
    file = tmp_path / "features.onnx"
    torch.onnx.export(
        model,
        (torch.rand(2, 3, 64, 64),),
        file,
        input_names=["images"],
        output_names=["features"],
        dynamic_axes={"images": {0: "n"}, "features": {0: "n"}},
        dynamo=False,
    )
    session = runtime.InferenceSession(file)
    images = torch.rand(3, 3, 64, 64)
    (features,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(features, model(images).detach().numpy(), atol=1e-5)


def test_it_copies_pickles_saves_and_trains_under_a_classifier(tmp_path):
    model = make_feature_extractor_model(make("hf-vit").eval(), output_module_name="network.network.vit.layernorm")
    images, labels = make_batch("hf-vit")
    expected = model(images)
    assert expected.shape[0] == len(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), expected)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert torch.equal(loaded(images), expected)
    assert loaded.image_spec == model.image_spec
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(expected[0].numel(), 3))
    whole = append_classifier(loaded, classifier, task_type="multiclass_classification")
    as_trainable(whole)(images, labels)["loss"].backward()
    assert whole.network[1][1].weight.grad.abs().sum() > 0


def test_bad_names_are_refused():
    with pytest.raises(
        ConfigError, match=r"Unknown module of Net 'blok'. Did you mean 'block'.*Known: block, block.li"
    ):
        make_feature_extractor_model(Net(), output_module_name="blok")
    idle = Net()
    idle.spare = nn.Identity()
    with pytest.raises(ConfigError, match="'spare' does not run when Net is called"):
        make_feature_extractor_model(idle, output_module_name="spare")(torch.rand(1, 4))
    with pytest.raises(ConfigError, match="block gives a str, no tensor"):
        make_feature_extractor_model(Net("text"), output_module_name="block")(torch.rand(1, 4))
    with pytest.raises(ConfigError, match=r"model must be a torch.nn.Module, got int"):
        make_feature_extractor_model(3)
