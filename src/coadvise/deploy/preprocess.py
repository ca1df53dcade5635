"""Preprocessing as part of an ONNX model: one decoded picture of any size in, probabilities out."""

from coadvise.config.schema import Fit, ImageSize, sides
from coadvise.data.images import MOST_OBLONG, PADDING
from coadvise.deploy.onnx_file import IMAGES, PROBABILITIES, Model

IMAGE = "image"  # name of the input
_TARGET = """
  target = Constant <value_ints = [{tall}, {wide}]> ()
  wanted = Cast <to = 11> (target)
  shape = Shape (image)
  start_of_sides = Constant <value_ints = [0]> ()
  end_of_sides = Constant <value_ints = [2]> ()
  whole = Slice (shape, start_of_sides, end_of_sides)
"""
_ROUNDED = """
  scaled = Mul (kept_exact, scale)
  rounded = Round (scaled)
  nearest = Cast <to = 7> (rounded)
"""
# Each gives the picture that is used, `used`, and the height and width that it is resized to, `inner`. As `fitted`
# does, in float64, so that sides are rounded alike.
_INNER: dict[Fit, str] = {
    "crop": """
  two = Constant <value_int = 2> ()
  other_way = Constant <value_ints = [1, 0]> ()
  sides_swapped = Gather (whole, other_way)
  target_swapped = Gather (target, other_way)
  most_oblong = Constant <value_int = {oblong}> ()
  longest = Mul (sides_swapped, most_oblong)
  longest_scaled = Mul (longest, target)
  most = Div (longest_scaled, target_swapped)
  kept = Min (whole, most)
  left_out = Sub (whole, kept)
  from = Div (left_out, two)
  to = Add (from, kept)
  rows_and_columns = Constant <value_ints = [0, 1]> ()
  used = Slice (image, from, to, rows_and_columns)
  kept_exact = Cast <to = 11> (kept)
  scales = Div (wanted, kept_exact)
  scale = ReduceMax <keepdims = 0> (scales)
"""
    + _ROUNDED
    + """
  inner = Max (nearest, target)
""",
    "pad": """
  one = Constant <value_int = 1> ()
  used = Identity (image)
  kept_exact = Cast <to = 11> (whole)
  scales = Div (wanted, kept_exact)
  scale = ReduceMin <keepdims = 0> (scales)
"""
    + _ROUNDED
    + """
  at_least_one = Max (nearest, one)
  inner = Min (at_least_one, target)
""",
    "stretch": """
  used = Identity (image)
  inner = Identity (target)
""",
}
# First the columns, then the rows, each rounded to whole grey levels as Pillow does. All four axes here and where it is
# padded: ONNX Runtime 1.32 moves a transposition past both, and mixes up some axes.
_RESIZED = """
  first = Transpose <perm = [2, 0, 1]> (used)
  exact = Cast <to = 1> (first)
  batch_axis = Constant <value_ints = [0]> ()
  batched = Unsqueeze (exact, batch_axis)
  black = Constant <value_float = 0.0> ()
  white = Constant <value_float = 255.0> ()
  one_side = Constant <value_ints = [1]> ()
  two_sides = Constant <value_ints = [2]> ()
  before_width = Constant <value_ints = [3]> ()
  whole_sizes = Shape (batched)
  whole_but_width = Slice (whole_sizes, batch_axis, before_width)
  inner_width = Slice (inner, one_side, two_sides)
  narrowed = Concat <axis = 0> (whole_but_width, inner_width)
  rows = Resize <mode = "cubic", cubic_coeff_a = -0.5, antialias = 1, exclude_outside = 1> (batched, , , narrowed)
  row_levels = Round (rows)
  row_pixels = Clip (row_levels, black, white)
  without_sides = Slice (whole_sizes, batch_axis, two_sides)
  sizes = Concat <axis = 0> (without_sides, inner)
  resized = Resize <mode = "cubic", cubic_coeff_a = -0.5, antialias = 1, exclude_outside = 1> (row_pixels, , , sizes)
  levels = Round (resized)
  clipped = Clip (levels, black, white)
"""
_PLACED: dict[Fit, str] = {
    "crop": """
  spatial = Constant <value_ints = [2, 3]> ()
  beside = Sub (inner, target)
  begin = Div (beside, two)
  end = Add (begin, target)
  placed = Slice (clipped, begin, end, spatial)
""",
    "pad": """
  two = Constant <value_int = 2> ()
  ground = Constant <value = float[1, 3, 1, 1] {{{padding}}}> ()
  above_ground = Sub (clipped, ground)
  beside = Sub (target, inner)
  before = Div (beside, two)
  behind = Sub (beside, before)
  none = Constant <value_ints = [0, 0]> ()
  borders = Concat <axis = 0> (none, before, none, behind)
  padded = Pad (above_ground, borders, black)
  placed = Add (padded, ground)
""",
    "stretch": """
  placed = Identity (clipped)
""",
}
_SCALED = """
  pixels = Div (placed, white)
"""


def with_preprocessing(network: Model, size: ImageSize, fit: Fit) -> Model:
    """A model of one picture, uint8 [height, width, 3] (upright RGB of any size), to probabilities [K].

    It resizes, crops or pads as `fitted` does. A few of the resized pixels differ from Pillow's by a grey level.

    Args:
        network: Images [B, 3, H, W] in 0..1 to probabilities [B, K]. It is not changed.
        size: Pixels that the network takes.
        fit: How a picture of another shape is fitted to them.
    """
    import onnx
    import onnx.compose
    import onnx.parser

    tall, wide = sides(size)
    steps = _TARGET + _INNER[fit] + _RESIZED + _PLACED[fit] + _SCALED
    body = steps.format(tall=tall, wide=wide, oblong=MOST_OBLONG, padding=", ".join(f"{level}.0" for level in PADDING))
    opset = next(entry.version for entry in network.opset_import if not entry.domain)
    head = f'<ir_version: {network.ir_version}, opset_import: ["" : {opset}]>'
    classes = network.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    before = onnx.parser.parse_model(
        f"{head} preprocessing (uint8[height, width, 3] {IMAGE}) => (float[1, 3, {tall}, {wide}] pixels) {{{body}}}"
    )
    after = onnx.parser.parse_model(
        f"{head} one_picture (float[batch, {classes}] answers) => (float[{classes}] {PROBABILITIES}) {{\n"
        f"  first_axis = Constant <value_ints = [0]> ()\n  {PROBABILITIES} = Squeeze (answers, first_axis)\n}}"
    )
    inside = onnx.compose.add_prefix(network, "network/")
    joined = onnx.compose.merge_models(before, inside, [("pixels", f"network/{IMAGES}")])
    return onnx.compose.merge_models(joined, after, [(f"network/{PROBABILITIES}", "answers")])
