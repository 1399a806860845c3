"""Taking BN layers out of modules: what stands in their place, and what else stays as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import shim
import torch
from folding_nets import Net, as_double, folds, image, randomized
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import bntools
from bntools.backends.torch.layers import modules

torchvision = shim.import_torchvision()
timm = pytest.importorskip("timm")


class BNReLU(nn.BatchNorm2d):
    """BN and a functional activation in one, as many code bases have it."""

    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.2)


class DoubleBN(nn.BatchNorm2d):
    """BN that computes in another precision."""

    def forward(self, x):
        own = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(x.double(), *(tensor.double() for tensor in own), eps=self.eps).to(x.dtype)


class WrittenBN(nn.BatchNorm2d):
    """BN by arithmetic of its own."""

    def forward(self, x):
        shape = (1, -1, 1, 1)
        x = (x - self.running_mean.view(shape)) * (self.running_var + self.eps).rsqrt().view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape)


class GatedBN(nn.BatchNorm2d):
    """BN whose output is also used in another way."""

    def forward(self, x):
        y = super().forward(x)
        return y * y.sigmoid().mean((2, 3), keepdim=True)


def behind_a_conv(norm: nn.Module) -> nn.Sequential:
    """The layer behind a convolution without a bias."""
    return randomized(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), norm))


def test_an_activation_in_the_layer_stays():
    """A subclass that ends in an activation gives way to that activation's module, with its arguments."""
    folded = folds(behind_a_conv(BNReLU(4)), image(3)).model
    assert isinstance(folded[1], nn.LeakyReLU)
    assert folded[1].negative_slope == 0.2


@pytest.mark.parametrize("function", [F.relu, F.relu6, F.silu, F.elu, F.gelu, F.hardswish, torch.tanh, torch.sigmoid])
def test_every_activation_stands_for_itself(function):
    """The module in the layer's place computes what the layer's own function did."""
    norm = nn.BatchNorm2d(4)
    kind = type("BNAct", (nn.BatchNorm2d,), {"forward": lambda self, x: function(nn.BatchNorm2d.forward(self, x))})
    norm.__class__ = kind
    folded = folds(behind_a_conv(norm), image(3))
    assert folded.folded == ["1"]
    assert not modules(folded.model)


def test_children_of_the_layer_stay_under_their_names():
    """timm's BatchNormAct2d leaves its drop and act behind, reachable as before."""
    norm = timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU)
    folded = folds(behind_a_conv(norm), image(3)).model
    assert isinstance(folded[1], nn.Sequential)
    assert isinstance(folded[1].act, nn.SiLU)
    assert dict(folded.named_modules()).keys() >= {"1.drop", "1.act"}


def test_a_layer_that_does_more_is_kept():
    """What a subclass adds and nothing can stand for is named."""
    kept = folds(behind_a_conv(GatedBN(4)), image(3)).kept
    assert kept == {"1": "its GatedBN does more than normalize (sigmoid, mean, mul)"}


@pytest.mark.parametrize("norm", [DoubleBN(4), WrittenBN(4), torchvision.ops.FrozenBatchNorm2d(4)])
def test_a_layer_that_is_a_scale_and_shift_in_its_own_way_folds(norm):
    """Casts and arithmetic in the layer's forward do not matter where it is found to be a scale and shift."""
    folded = folds(behind_a_conv(norm), image(3))
    assert folded.folded == ["1"]
    assert type(folded.model[1]) is nn.Identity


def test_a_frozen_layer_with_an_activation_is_not_taken_for_a_scale_and_shift():
    """A deliberate mutant: on this example the activation does nothing, and the layer is still not folded."""

    class Clipped(WrittenBN):
        def forward(self, x):
            return super().forward(x).clamp(min=-1.0)

    model = behind_a_conv(Clipped(4))
    nn.init.constant_(model[1].bias, 100.0)
    kept = folds(model, image(3)).kept
    assert "its Clipped does more than normalize (" in kept["1"]


def test_a_frozen_layer_with_children_folds():
    """timm's FrozenBatchNormAct2d is arithmetic on buffers, then drop and act, which stay."""
    folded = folds(behind_a_conv(timm.layers.FrozenBatchNormAct2d(4)), image(3))
    assert folded.folded == ["1"]
    assert isinstance(folded.model[1].act, nn.ReLU)


def test_a_frozen_layer_takes_up_another_one():
    """BN behind a frozen BN that has to stay is folded into its buffers."""
    parts = [nn.ReLU(), torchvision.ops.FrozenBatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()]
    result = folds(randomized(nn.Sequential(*parts)), image(3))
    assert result.folded == ["2"]
    assert [layer.name for layer in bntools.inspect(result.model)] == ["1"]


def test_synchronized_layers_fold():
    """In eval mode SyncBatchNorm is BN."""
    assert folds(behind_a_conv(nn.SyncBatchNorm(4)), image(3)).folded == ["1"]


def test_layers_frozen_by_bntools_fold():
    """What bntools.freeze leaves on a layer does not stand in the way, and is gone with it."""
    model = behind_a_conv(nn.BatchNorm2d(4))
    bntools.freeze(model)
    folded = folds(model, image(3)).model
    assert b"bntools" not in pickle.dumps(folded)


def test_a_layer_under_two_names_is_replaced_under_both():
    """One module object at two places in the tree is taken out of both."""
    model = Net(lambda m, x: m.again[0](m.conv(x)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    model.again = nn.ModuleList([model.bn])
    folded = folds(randomized(model), image(3)).model
    assert not modules(folded)
    assert folded.again[0] is folded.bn


def test_a_layer_in_a_plain_list_does_nothing_any_more():
    """A model that calls its layer through a list that is no part of the module tree is right all the same."""
    model = Net(lambda m, x: m.hidden[0](m.conv(x)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    model.hidden = [model.bn]
    assert folds(randomized(model), image(3)).folded == ["bn"]


def test_a_layer_whose_forward_is_called_directly_folds():
    """``layer.forward(x)`` goes past the module's hooks and is seen all the same."""
    model = Net(lambda m, x: m.bn.forward(m.conv(x)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    assert folds(randomized(model), image(3)).folded == ["bn"]


def test_weights_that_layers_share_are_parted_where_only_one_changes():
    """Two convolutions with one weight and a BN each fold; the original keeps its tie."""
    model = Net(lambda m, x: m.bn(m.b(m.a(x).relu())), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    model.b.weight, model.b.bias = model.a.weight, model.a.bias
    result = folds(randomized(model), image(3))
    assert result.folded == ["bn"]
    assert torch.equal(result.model.a.weight, model.a.weight)
    assert model.b.weight is model.a.weight


def test_a_weight_used_outside_of_the_layers_that_share_it_is_left():
    """Where it cannot be told whose weight was read, it is not rewritten."""
    model = Net(
        lambda m, x: m.bn(F.conv2d(m.a(x), m.b.weight)),
        a=nn.Conv2d(3, 3, 1),
        b=nn.Conv2d(3, 3, 1),
        bn=nn.BatchNorm2d(3),
    )
    model.b.weight = model.a.weight
    assert "its weight is shared by a.weight and b.weight" in folds(randomized(model), image(3)).kept["bn"]


def test_a_tied_embedding_keeps_its_numbers():
    """An embedding that shares the weight of a folded dense layer is not scaled with it."""
    model = Net(
        lambda m, x: m.bn(m.fc(m.emb(x))), emb=nn.Embedding(6, 6), fc=nn.Linear(6, 6, bias=False), bn=nn.BatchNorm1d(6)
    )
    model.fc.weight = model.emb.weight
    result = bntools.fold(randomized(model), torch.arange(6))
    assert result.folded == ["bn"]
    assert result.check.error < 1e-6


@pytest.mark.parametrize(
    "wrapped",
    [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.spectral_norm],
    ids=["weight_norm", "spectral_norm", "old spectral_norm"],
)
def test_computed_weights_are_left(wrapped):
    """A weight that is computed in every forward pass cannot be rewritten."""
    model = randomized(nn.Sequential(wrapped(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)))
    kept = folds(model, image(3)).kept
    assert "cannot take it up: its weight is computed in the forward pass" in kept["1"]


def test_a_weight_in_a_buffer_is_left():
    """Buffers are constants of the code, often not saved: they are not rewritten."""
    model = Net(lambda m, x: m.bn(F.conv2d(x, m.kernel)), bn=nn.BatchNorm2d(4))
    model.register_buffer("kernel", torch.randn(4, 3, 1, 1), persistent=False)
    assert "its weight kernel is a buffer" in folds(randomized(model), image(3)).kept["bn"]


def test_values_that_a_hook_looks_at_are_left():
    """A forward hook on the convolution or the layer, of the user's, would see other numbers."""
    seen = []
    model = behind_a_conv(nn.BatchNorm2d(4))
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert "the output of conv '0' is read by a forward hook on '0' and" in folds(model, image(3)).kept["1"]
    handle.remove()
    assert folds(model, image(3)).folded == ["1"]


def test_values_that_the_model_keeps_are_left():
    """A convolution's output that the model stores on itself is seen from outside; the original stores nothing."""

    def run(m, x):
        m.features = m.conv(x)
        return m.bn(m.features)

    model = randomized(Net(run, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)))
    before = set(vars(model))
    assert "the output of conv 'conv' is kept after the forward pass" in bntools.fold(model, image(3)).kept["bn"]
    assert set(vars(model)) == before | {"features"}  # by the comparison, which runs the model as any caller does
    assert not model.features.is_inference()


def test_tensors_left_by_training_do_not_stop_the_copy():
    """Activations with a gradient history on a module refuse copy.deepcopy; they are detached in the copy."""

    def run(m, x):
        m.last = m.bn(m.conv(x))
        return m.last

    model = randomized(Net(run, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)))
    model(image(3)).sum()
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    assert bntools.fold(model, image(3)).folded == ["bn"]


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["parallel", "compiled"]
)
def test_wrapped_models_fold(wrap):
    """The result is the module inside the wrapper."""
    model = behind_a_conv(nn.BatchNorm2d(4))
    result = bntools.fold(wrap(model), image(3))
    assert type(result.model) is nn.Sequential
    assert result.folded == ["1"]


def test_class_names_and_keys_survive():
    """The folded model has the class, the parameter names and the memory format of the original."""
    model = randomized(torchvision.models.resnet18(weights=None)).to(memory_format=torch.channels_last)
    folded = bntools.fold(model, image(3, size=32)).model
    assert type(folded) is type(model)
    kept = {key for key in model.state_dict() if "bn" not in key and "downsample.1" not in key}
    assert set(folded.state_dict()) == kept | {key.replace("weight", "bias") for key in kept if "fc" not in key}
    assert folded.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_double_and_single_precision_agree_on_the_example():
    """A check of the tests' own helper: the float64 copy of a batch has the same numbers."""
    assert torch.equal(as_double(image(3)).float(), image(3))
