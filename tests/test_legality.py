"""Which layers fold, exactly, and which are kept for which reason, in PyTorch models."""

from __future__ import annotations

import pytest
import torch
from folding_nets import Net, folds, image, randomized
from torch import nn
from torch.nn import functional as F

import bntools

CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
NORMS = [None, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]


def dims_of(kind: type[nn.Module]) -> int:
    """The number of spatial axes that a convolution class works on."""
    return int(kind.__name__[-2])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_every_convolution_takes_up_the_layer_behind_it(kind, groups, bias, affine):
    """conv -> BN folds back for 1 to 3 dimensions, transposed or not, with groups, with and without bias and affine."""
    dims = dims_of(kind)
    out = 4 if groups == 4 else 6
    conv = kind(4, out, 3, stride=2, padding=1, groups=groups, bias=bias)
    model = randomized(nn.Sequential(conv, NORMS[dims](out, affine=affine)))
    folded = folds(model, image(4, dims))
    assert folded.folded == ["1"]
    assert isinstance(folded.model[1], nn.Identity)


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_only_a_scale_or_only_a_shift_folds(missing):
    """A layer may have one of the two: back, forward, and as what takes up another layer."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))
    model += nn.Sequential(nn.ReLU(), nn.BatchNorm2d(5), nn.BatchNorm2d(5), nn.ReLU())
    for i in (1, 3, 6, 7):
        model[i].register_parameter(missing, None)
    result = folds(randomized(model), image(3))
    assert result.folded == ["1", "3", "7"]
    assert result.model[6].weight is not None
    assert result.model[6].bias is not None


@pytest.mark.parametrize("kind", CONVOLUTIONS[:3])
@pytest.mark.parametrize("mode", ["valid", "reflect", "replicate", "circular"])
def test_a_convolution_that_sees_no_zeros_takes_up_the_layer_before_it(kind, mode):
    """relu -> BN -> conv folds forward without padding, and with any padding but zeros."""
    dims = dims_of(kind)
    if mode == "reflect" and dims == 1:
        mode = "circular"
    padding = {"padding": 0} if mode == "valid" else {"padding": 1, "padding_mode": mode}
    conv = kind(4, 6, 3, groups=2, bias=False, **padding)
    model = randomized(nn.Sequential(nn.ReLU(), NORMS[dims](4), conv))
    assert folds(model, image(4, dims)).folded == ["1"]


def test_a_convolution_that_pads_with_zeros_takes_up_a_scale_only():
    """A shift would have to be added to the padding as well; without one the layer folds."""
    model = randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding="same")))
    assert folds(model, image(3)).kept == {
        "1": "cannot go back: relu '0' stands between it and anything that could take it up; "
        "cannot go forward: conv '2' pads with zeros, which a shift would change"
    }
    model[1].running_mean.zero_()
    nn.init.zeros_(model[1].bias)
    assert folds(model, image(3)).folded == ["1"]


@pytest.mark.parametrize(("kernel", "folded"), [(1, True), (2, False)])
def test_a_transposed_convolution_takes_up_a_shift_where_all_outputs_see_all_taps(kernel, folded):
    """With more than one tap, or a stride, outputs at the border or in between get other sums."""
    model = randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, kernel, groups=2)))
    result = folds(model, image(4))
    assert bool(result.folded) is folded
    if not folded:
        assert "transposed conv '2' gives its outputs from different numbers of inputs" in result.kept["1"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_dense_layer_takes_up_both_neighbours(bias, affine):
    """BN -> Linear folds forward, Linear -> BN back, with and without bias and affine."""
    parts = [nn.BatchNorm1d(3, affine=affine), nn.Linear(3, 5, bias=bias), nn.BatchNorm1d(5, affine=affine)]
    assert folds(randomized(nn.Sequential(*parts)), torch.randn(4, 3)).folded == ["0", "2"]


def test_dense_layers_on_more_axes_fold_along_their_own():
    """Linear works on the last axis: BN after a transposition folds, BN on an axis of equal size does not."""
    model = Net(lambda m, x: m.bn(m.fc(x).transpose(1, 2)), fc=nn.Linear(5, 6), bn=nn.BatchNorm1d(6))
    assert folds(randomized(model), torch.randn(2, 6, 5)).folded == ["bn"]
    # The shapes agree and the meaning does not: folding here was off by 1.1 to 4.1.
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    kept = folds(randomized(model), torch.randn(2, 6, 5)).kept
    assert "dense '0' has its channels on axis 2, the layer on axis 1" in kept["1"]


def test_dense_layers_on_flattened_batches_fold():
    """Linear -> flatten(0, 1) -> BN -> reshape_as, as LeViT does it."""
    model = Net(lambda m, x: m.bn((y := m.fc(x)).flatten(0, 1)).reshape_as(y), fc=nn.Linear(5, 6), bn=nn.BatchNorm1d(6))
    assert folds(randomized(model), torch.randn(2, 6, 5)).folded == ["bn"]


@pytest.mark.parametrize(
    "product",
    [
        lambda m, x: x @ m.weight.t() + m.bias,
        lambda m, x: torch.addmm(m.bias, x, m.weight.t()),
        lambda m, x: m.bias + torch.mm(x, m.weight.T),
        lambda m, x: (m.weight @ x.t()).t() + m.bias,
        lambda m, x: F.linear(x, m.weight) + m.bias,
        lambda m, x: F.linear(x, m.weight, m.bias),
    ],
    ids=["matmul", "addmm", "mm", "left", "sum", "linear"],
)
def test_products_with_a_stored_matrix_are_dense_layers(product):
    """MatMul + Add in the ways that people write it, with the weight transposed or not."""
    model = Net(lambda m, x: m.bn(product(m.fc, x)), fc=nn.Linear(3, 5), bn=nn.BatchNorm1d(5))
    assert folds(randomized(model), torch.randn(4, 3)).folded == ["bn"]


def test_a_product_without_a_bias_takes_up_no_shift():
    """Code that multiplies with a stored matrix has no place for a bias: the layer is kept, and says so."""
    model = Net(lambda m, x: m.bn(x @ m.fc.weight.t()), fc=nn.Linear(3, 5), bn=nn.BatchNorm1d(5))
    assert "dense has no place for a bias" in folds(randomized(model), torch.randn(4, 3)).kept["bn"]


def test_instance_norm_with_statistics_is_a_scale_and_shift_as_well():
    """In eval mode it uses its running statistics, the same for all instances."""
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    assert folds(randomized(nn.Sequential(nn.Conv2d(3, 4, 1), norm)), image(3)).folded == ["1"]


@pytest.mark.parametrize(
    "between",
    [
        nn.Flatten(),
        nn.AdaptiveAvgPool2d(1),
        nn.MaxPool2d(2, padding=1),
        nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ReflectionPad2d(1),
        nn.Sequential(nn.Dropout(), nn.Identity(), nn.Dropout2d()),
    ],
)
def test_a_scale_and_shift_goes_forward_through_what_keeps_the_channels(between):
    """BN -> views, pooling, resizing, padding with the input's own values -> Linear or conv."""
    x = image(3, size=6)
    y = between(x)
    last = nn.Linear(y.shape[1], 4) if y.ndim == 2 else nn.Conv2d(3, 4, 1)
    model = randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), between, last), positive=True)
    assert folds(model, x).folded == ["1"]


@pytest.mark.parametrize(
    "between",
    [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.AdaptiveMaxPool2d(2),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.Upsample(scale_factor=2),
        nn.ReplicationPad2d(1),
    ],
)
def test_a_scale_and_shift_goes_back_through_what_keeps_the_channels(between):
    """conv -> pooling, flatten, resizing -> BN."""
    shape = between(image(4)).shape
    model = nn.Sequential(nn.Conv2d(3, 4, 1), between, (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(4))
    assert folds(randomized(model, positive=True), image(3)).folded == ["2"]


def test_a_channel_shuffle_written_with_views_is_followed():
    """View, transpose, view, as ShuffleNet does it: each channel's scale finds its place, in both directions."""

    def shuffled(x):
        return x.view(2, 2, 3, 5, 5).transpose(1, 2).flatten(1, 2)

    back = Net(lambda m, x: m.bn(shuffled(m.conv(x))), conv=nn.Conv2d(3, 6, 1), bn=nn.BatchNorm2d(6))
    assert folds(randomized(back), image(3)).folded == ["bn"]
    ahead = Net(lambda m, x: m.conv(shuffled(m.bn(x.relu()))), conv=nn.Conv2d(6, 4, 1), bn=nn.BatchNorm2d(6))
    assert folds(randomized(ahead), image(6)).folded == ["bn"]


def test_a_layer_on_flattened_features_goes_back_only_where_it_is_constant_per_channel():
    """conv -> flatten -> BN with its own scale for every pixel has no counterpart in the convolution."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.BatchNorm1d(100)))
    assert "conv '0' has its channels on axis 1, the layer on axis" in folds(model, image(3)).kept["2"]
    for tensor in (model[2].running_mean, model[2].running_var, model[2].weight.data, model[2].bias.data):
        tensor.copy_(tensor.view(4, 25)[:, :1].expand(4, 25).flatten())
    assert folds(model, image(3)).folded == ["2"]


def test_a_negative_scale_stops_at_a_max_pooling_and_says_which_channel():
    """Max pooling and a negative scale do not commute; zero and positive ones do."""
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Conv2d(3, 4, 1))
    randomized(model, positive=True)
    nn.init.zeros_(model[1].weight[2:])
    assert folds(model, image(3)).folded == ["1"]
    with torch.no_grad():
        model[1].weight[1] = -0.5
    reason = folds(model, image(3)).kept["1"]
    assert "max_pool2d '2' needs a scale that is not negative, and channel 1 has -0." in reason


def test_a_concatenation_is_folded_into_each_branch():
    """Backward into all producers of a concatenation; forward from one branch into its part of the reader."""
    back = Net(
        lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 1)),
        a=nn.Conv2d(3, 2, 1),
        b=nn.Conv2d(3, 5, 3, padding=1, bias=False),
        bn=nn.BatchNorm2d(7),
    )
    assert folds(randomized(back), image(3)).folded == ["bn"]
    ahead = Net(
        lambda m, x: m.conv(torch.cat([x.sigmoid(), m.bn(x.relu()), m.bn2(x.tanh())], 1)),
        bn=nn.BatchNorm2d(3),
        bn2=nn.BatchNorm2d(3),
        conv=nn.Conv2d(9, 4, 3),
    )
    assert folds(randomized(ahead), image(3)).folded == ["bn", "bn2"]
    mixed = Net(lambda m, x: m.bn(torch.cat([m.a(x), x], 1)), a=nn.Conv2d(3, 2, 1), bn=nn.BatchNorm2d(5))
    assert "reads an input of the model or a constant" in folds(randomized(mixed), image(3)).kept["bn"]


def test_a_sum_of_convolutions_is_folded_into_each_term():
    """conv + conv -> BN: the scale goes into both, the shift into one."""
    model = Net(
        lambda m, x: m.bn(m.a(x) + m.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1, bias=False), bn=nn.BatchNorm2d(4)
    )
    assert folds(randomized(model), image(3)).folded == ["bn"]


def test_chains_fold_one_after_the_other():
    """conv -> BN -> BN folds both; behind a nonlinearity the second folds into the first, which stays."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
    assert folds(randomized(model), image(3)).folded == ["1", "2"]
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU())
    result = folds(randomized(model), image(3))
    assert result.folded == ["2", "3"]
    assert [layer.name for layer in bntools.inspect(result.model)] == ["1"]
    assert "affine=True" in repr(result.model[1])


def test_a_fold_can_make_way_for_another():
    """BN -> BN -> conv with zero padding: the first has no shift left over only once the second is gone."""
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    randomized(model)
    with torch.no_grad():
        model[1].running_mean.zero_()
        model[1].bias.fill_(1.0)
        model[2].running_mean.fill_(1.0)
        model[2].bias.zero_()
    assert folds(model, image(3)).folded == ["1", "2"]


def test_shared_layers_fold_once_for_all_their_calls():
    """A shared conv with a shared BN folds, as in the heads of a feature pyramid."""
    model = Net(
        lambda m, x: [m.bn(m.conv(y)).relu() for y in (x, x[..., 1:], x.tanh())],
        conv=nn.Conv2d(3, 4, 1),
        bn=nn.BatchNorm2d(4),
    )
    assert folds(randomized(model), image(3)).folded == ["bn"]
    two = Net(
        lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)
    )
    assert folds(randomized(two), image(3)).folded == ["bn"]


def test_equal_layers_on_one_value_fold_together():
    """Layers that do the same to one output ask its weights for the same; where one of them differs, all stay."""

    def net(count, odd=False):
        names = [f"bn{i}" for i in range(count)]
        layers = {name: nn.BatchNorm2d(4) for name in names}

        def forward(m, x):
            y = m.conv(x)
            return [getattr(m, name)(y).relu() for name in names]

        model = randomized(Net(forward, conv=nn.Conv2d(3, 4, 1), **layers))
        for name in names[1:]:
            getattr(model, name).load_state_dict(model.bn0.state_dict())
            getattr(model, name).eps = model.bn0.eps
        if odd:
            model.bn0.running_mean[0] += 1
        return model

    assert folds(net(2), image(3)).folded == ["bn0", "bn1"]
    assert folds(net(3), image(3)).folded == ["bn0", "bn1", "bn2"]
    assert folds(net(3, odd=True), image(3)).folded == []
    assert bntools.fold(net(2), image(3), layers="bn0").kept.keys() == {"bn0", "bn1"}


def test_in_place_operations_behind_a_layer_do_no_harm():
    """conv -> BN -> ReLU(inplace), and a residual sum in place, fold as their copies do."""
    model = Net(
        lambda m, x: m.relu(m.bn(m.conv(x))).add_(x).relu_(),
        conv=nn.Conv2d(3, 3, 1),
        bn=nn.BatchNorm2d(3),
        relu=nn.ReLU(inplace=True),
    )
    assert folds(randomized(model), image(3)).folded == ["bn"]


def test_the_order_of_execution_counts_and_not_that_of_definition():
    """A model that defines its layers in another order folds along its forward pass."""
    model = Net(
        lambda m, x: m.bn(m.first(m.act(m.second(x)))),
        second=nn.Conv2d(3, 5, 1),
        bn=nn.BatchNorm2d(4),
        act=nn.ReLU(),
        first=nn.Conv2d(5, 4, 1),
    )
    before = model.second.weight.clone()
    folded = folds(randomized(model), image(3))
    assert folded.folded == ["bn"]
    assert torch.equal(folded.model.second.weight, before)
