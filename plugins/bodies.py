"""The bodies of the custom ops in standard ops, as ONNX text (opset 17); :mod:`darktrt.plugins.ops` states what they compute.

Formal inputs and outputs have the names of the ops' ``input_names`` and ``output_names``, and ``@name`` is an attribute of the
node. ONNX text has no nested expressions; ``#`` begins a comment.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import Template

from darktrt.metadata import HeadKind, NmsKind


def mish() -> str:
    """``x`` to ``y``."""
    return _MISH.substitute(x="x", y="y")


def mish_add() -> str:
    """``x`` and ``residual`` to ``y``."""
    return _MISH.substitute(x="x", y="activated") + _MISH_ADD


def mish_concat() -> str:
    """``x`` and ``second`` to ``y``."""
    first, second = (_MISH.substitute(x=x, y=f"activated_{x}") for x in ("x", "second"))
    return first + second + _MISH_CONCAT


def decode(kinds: Sequence[HeadKind]) -> str:
    """``head0_raw``, ``head1_raw`` and so on to ``boxes`` and ``scores``."""
    names = {part: ", ".join(f"head{i}_{part}" for i in range(len(kinds))) for part in ("anchors", "boxes", "scores")}
    of_heads = (
        part.substitute(index=i, head=f"head{i}", channels="rest" if kind == "Gaussian_yolo" else "channels")
        for i, kind in enumerate(kinds)
        for part in (_DECODE_CHANNELS, _DECODE_VALUES[kind], _DECODE_HEAD)
    )
    of_yolo = _DECODE_YOLO if "yolo" in kinds else ""
    return "".join([_DECODE_BEGIN.substitute(names), of_yolo, *of_heads, _DECODE_END.substitute(names)])


def suppress(kind: NmsKind, letterbox: int, opset: int) -> str:
    """``boxes`` and ``scores`` of :func:`decode`, and the thresholds, to detections."""
    overlap = _NMS_PLAIN
    if kind != "plain":
        overlap = "".join([_NMS_EXPONENT[kind], _NMS_IMAGE_SIZES[letterbox], _NMS_DISTANCE])
    best = _NMS_BEST_SCORE[opset >= _AXES_ARE_INPUTS]
    return "".join([_NMS_MASK, best, _NMS_CANDIDATES, _NMS_IOU, overlap, _NMS_SUPPRESSION, _NMS_OUTPUT])


def preprocess(channels: int, letterbox: int) -> str:
    """``images`` to ``pixels``, ``image_size`` and ``placement``."""
    inner = _FIT_INNER_LETTERBOX if letterbox else _FIT_INNER_STRETCH
    taps = (_FIT_TAPS.substitute(axis=axis, index=index) for index, axis in enumerate("xy"))
    read = _FIT_GRAY if channels == 1 else _FIT_RGB
    pairs = (("first", "first"), ("first", "second"), ("second", "first"), ("second", "second"))
    corners = (
        _FIT_CORNER.substitute(row=row, column=column) + read.substitute(corner=f"{row}_{column}") for row, column in pairs
    )
    canvas = _FIT_CANVAS if letterbox else _FIT_FULL
    return "".join([_FIT_BEGIN, inner, *taps, _FIT_ROWS, *corners, _FIT_MIX, canvas, _FIT_PLACEMENT])


def place_boxes() -> str:
    """``boxes`` and ``placement`` to ``placed``."""
    return _PLACE_BOXES


_MISH = Template("""
    softplus_$x = Softplus ($x)
    gate_$x = Tanh (softplus_$x)
    $y = Mul ($x, gate_$x)
""")
_MISH_ADD = "    y = Add (activated, residual)\n"
_MISH_CONCAT = "    y = Concat <axis = 1> (activated_x, activated_second)\n"

_DECODE_BEGIN = Template("""
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    four = Constant <value_ints = [4]> ()
    rest = Constant <value_ints = [-1]> ()
    zero_scalar = Constant <value_int = 0> ()
    one_scalar = Constant <value_int = 1> ()
    one_float = Constant <value_float = 1.0> ()
    half = Constant <value_float = 0.5> ()
    classes_scalar = Constant <value_int: int = @classes> ()
    classes = Reshape (classes_scalar, one)
    parts = Concat <axis = 0> (two, two, one, classes)  # of the channels of an anchor: x y, w h, objectness, classes
    channels = ReduceSum (parts)
    box_shape = Concat <axis = 0> (zero, rest, four)
    score_shape = Concat <axis = 0> (zero, rest, classes)
    input_size = Constant <value_ints: ints = @input_size> ()
    size = CastLike (input_size, half)
    numbers = Constant <value_floats: floats = @anchors> ()
    pair_shape = Concat <axis = 0> (rest, two, one)
    anchor_pairs = Reshape (numbers, pair_shape)
    anchors_per_head = Constant <value_ints: ints = @anchors_per_head> ()
    $anchors = Split <axis = 0> (anchor_pairs, anchors_per_head)  # (anchors, 2, 1)
    scales = Constant <value_floats: floats = @scale_x_y> ()
""")

_DECODE_YOLO = """
    two_float = Constant <value_float = 2.0> ()
    new_coords_int = Constant <value_ints: ints = @new_coords> ()
    new_coords = Cast <to = 9> (new_coords_int)
"""

_DECODE_CHANNELS = Template("""
    ${head}_index = Constant <value_int = $index> ()
    ${head}_scale = Gather (scales, ${head}_index)

    # (N, anchors * channels, rows, columns) to (N, anchors, channels, cells)
    ${head}_anchor_count = Shape <start = 0, end = 1> (${head}_anchors)
    ${head}_rows = Shape <start = 2, end = 3> (${head}_raw)
    ${head}_columns = Shape <start = 3, end = 4> (${head}_raw)
    ${head}_cells = Mul (${head}_rows, ${head}_columns)
    ${head}_shape = Concat <axis = 0> (zero, ${head}_anchor_count, $channels, ${head}_cells)
    ${head}_channels = Reshape (${head}_raw, ${head}_shape)
""")

# The factor of the anchor is exp(raw), or (2 v)^2.
_DECODE_VALUES: dict[HeadKind, Template] = {
    "yolo": Template("""
    ${head}_new = Gather (new_coords, ${head}_index)
    ${head}_logistic = Sigmoid (${head}_channels)
    ${head}_value = Where (${head}_new, ${head}_channels, ${head}_logistic)
    ${head}_xy, ${head}_wh, ${head}_objectness, ${head}_class = Split <axis = 2> (${head}_value, parts)
    ${head}_wh_raw = Slice (${head}_channels, two, four, two)
    ${head}_exp = Exp (${head}_wh_raw)
    ${head}_doubled = Mul (${head}_wh, two_float)
    ${head}_square = Mul (${head}_doubled, ${head}_doubled)
    ${head}_factor = Where (${head}_new, ${head}_square, ${head}_exp)
"""),
    "region": Template("""
    ${head}_xy_raw, ${head}_wh_raw, ${head}_objectness_raw, ${head}_class_raw = Split <axis = 2> (${head}_channels, parts)
    ${head}_xy = Sigmoid (${head}_xy_raw)
    ${head}_factor = Exp (${head}_wh_raw)
    ${head}_objectness = Sigmoid (${head}_objectness_raw)
    ${head}_class = Softmax <axis = 2> (${head}_class_raw)
"""),
    "Gaussian_yolo": Template("""
    ${head}_eight = Constant <value_ints = [8]> ()
    ${head}_quarter = Constant <value_float = 0.25> ()
    ${head}_parts = Concat <axis = 0> (${head}_eight, one, classes)
    ${head}_box, ${head}_objectness_raw, ${head}_class_raw = Split <axis = 2> (${head}_channels, ${head}_parts)
    ${head}_means = Slice (${head}_box, zero, ${head}_eight, two, two)  # every other channel
    ${head}_uncertainties_raw = Slice (${head}_box, one, ${head}_eight, two, two)
    ${head}_pairs = Concat <axis = 0> (two, two)
    ${head}_xy_raw, ${head}_wh_raw = Split <axis = 2> (${head}_means, ${head}_pairs)
    ${head}_xy = Sigmoid (${head}_xy_raw)
    ${head}_factor = Exp (${head}_wh_raw)
    ${head}_uncertainties = Sigmoid (${head}_uncertainties_raw)
    ${head}_uncertainty_sum = ReduceSum (${head}_uncertainties, two)
    ${head}_uncertainty = Mul (${head}_uncertainty_sum, ${head}_quarter)
    ${head}_certainty = Sub (one_float, ${head}_uncertainty)
    ${head}_plain_objectness = Sigmoid (${head}_objectness_raw)
    ${head}_objectness = Mul (${head}_plain_objectness, ${head}_certainty)
    ${head}_class = Sigmoid (${head}_class_raw)
"""),
}

_DECODE_HEAD = Template("""
    # the cell of each position, as (2, cells): column, row
    ${head}_cell_count = Squeeze (${head}_cells)
    ${head}_cell = Range (zero_scalar, ${head}_cell_count, one_scalar)
    ${head}_cell_row = Unsqueeze (${head}_cell, zero)
    ${head}_column = Mod (${head}_cell_row, ${head}_columns)
    ${head}_row = Div (${head}_cell_row, ${head}_columns)
    ${head}_grid_int = Concat <axis = 0> (${head}_column, ${head}_row)
    ${head}_grid = CastLike (${head}_grid_int, half)
    ${head}_grid_size_int = Concat <axis = 0> (${head}_columns, ${head}_rows)
    ${head}_grid_size = CastLike (${head}_grid_size_int, half)
    ${head}_stride_row = Div (size, ${head}_grid_size)
    ${head}_stride = Unsqueeze (${head}_stride_row, one)

    # centre = (v * s + (cell - (s - 1) / 2)) * stride
    ${head}_excess = Sub (${head}_scale, one_float)
    ${head}_offset = Mul (${head}_excess, half)
    ${head}_shift = Sub (${head}_grid, ${head}_offset)
    ${head}_scaled = Mul (${head}_xy, ${head}_scale)
    ${head}_place = Add (${head}_scaled, ${head}_shift)
    ${head}_centre = Mul (${head}_place, ${head}_stride)

    ${head}_extent = Mul (${head}_factor, ${head}_anchors)
    ${head}_reach = Mul (${head}_extent, half)

    ${head}_low = Sub (${head}_centre, ${head}_reach)
    ${head}_high = Add (${head}_centre, ${head}_reach)
    ${head}_corners = Concat <axis = 2> (${head}_low, ${head}_high)
    ${head}_by_cell = Transpose <perm = [0, 1, 3, 2]> (${head}_corners)
    ${head}_boxes = Reshape (${head}_by_cell, box_shape)
    ${head}_score = Mul (${head}_class, ${head}_objectness)
    ${head}_score_by_cell = Transpose <perm = [0, 1, 3, 2]> (${head}_score)
    ${head}_scores = Reshape (${head}_score_by_cell, score_shape)
""")

_DECODE_END = Template("""
    boxes = Concat <axis = 1> ($boxes)
    scores = Concat <axis = 1> ($scores)
""")

_AXES_ARE_INPUTS = 18
"""The opset from which ReduceMax takes its axes so."""
_NMS_BEST_SCORE = (
    """
    best_score = ReduceMax <axes = [2], keepdims = 0> (ranked)
""",
    """
    best_score = ReduceMax <keepdims = 0> (ranked, two)
""",
)

# The score of a pair that is no candidate becomes the lowest float, so that no NaN is sorted and the candidates are those above
# it, whatever the threshold. A box counts its finite coordinates: NaN is not <= the largest float either.
_NMS_MASK = """
    zero_float = Constant <value_float = 0.0> ()
    four_float = Constant <value_float = 4.0> ()
    largest = Constant <value_float = 3.4028235e38> ()
    lowest = Constant <value_float = -3.4028235e38> ()
    extents = Abs (boxes)
    finite_bool = LessOrEqual (extents, largest)
    finite = CastLike (finite_bool, boxes)
    finite_count = ReduceSum (finite, two)  # (N, A, 1)
    box_is_finite = Equal (finite_count, four_float)
    above = Greater (scores, score_threshold)
    is_candidate = And (above, box_is_finite)
    ranked = Where (is_candidate, scores, lowest)
"""

# The best pairs are in the anchors of the best class scores, so a first TopK over A anchors saves one over A * classes pairs.
# Those anchors stay in their old order, which preserves the order of equal scores. (ONNX sorts the lower index first among
# equals; TensorRT's documentation states nothing.)
_NMS_CANDIDATES = """
    max_candidates_scalar = Constant <value_int: int = @max_candidates> ()
    max_candidates = Reshape (max_candidates_scalar, one)
    anchor_count = Shape <start = 1, end = 2> (scores)
    best_count = Min (anchor_count, max_candidates)
    unused_score, best_anchor = TopK (best_score, best_count)
    anchor, unused_order = TopK <largest = 0> (best_anchor, best_count)  # (N, best_count), rising
    anchor_index = Unsqueeze (anchor, two)
    anchor_scores = GatherND <batch_dims = 1> (ranked, anchor_index)
    flat_shape = Concat <axis = 0> (zero, rest)
    pair_scores = Reshape (anchor_scores, flat_shape)
    pairs = Mul (best_count, classes)
    candidates = Min (pairs, max_candidates)
    score, pair = TopK (pair_scores, candidates)  # (N, candidates), falling
    class = Mod (pair, classes)
    place = Div (pair, classes)
    place_index = Unsqueeze (place, two)
    candidate_anchor = GatherND <batch_dims = 1> (anchor, place_index)
    candidate_index = Unsqueeze (candidate_anchor, two)
    box = GatherND <batch_dims = 1> (boxes, candidate_index)
"""

# Where there is no area, `tiny` makes the union, and so the IoU's divisor, positive; it changes no other one.
_NMS_IOU = """
    edges = Concat <axis = 0> (one, one, one, one)
    x1, y1, x2, y2 = Split <axis = 2> (box, edges)  # (N, candidates, 1); with _row (N, 1, candidates)
    x1_row = Transpose <perm = [0, 2, 1]> (x1)
    y1_row = Transpose <perm = [0, 2, 1]> (y1)
    x2_row = Transpose <perm = [0, 2, 1]> (x2)
    y2_row = Transpose <perm = [0, 2, 1]> (y2)
    tiny = Constant <value_float = 1e-37> ()
    width = Sub (x2, x1)
    height = Sub (y2, y1)
    true_area = Mul (width, height)
    area = Max (true_area, tiny)
    area_row = Transpose <perm = [0, 2, 1]> (area)
    inner_x1 = Max (x1, x1_row)
    inner_x2 = Min (x2, x2_row)
    inner_width = Sub (inner_x2, inner_x1)
    shared_width = Relu (inner_width)
    inner_y1 = Max (y1, y1_row)
    inner_y2 = Min (y2, y2_row)
    inner_height = Sub (inner_y2, inner_y1)
    shared_height = Relu (inner_height)
    intersection = Mul (shared_width, shared_height)
    areas = Add (area, area_row)
    union = Sub (areas, intersection)
    iou = Div (intersection, union)
"""

# `sizes` is width, height, width, height: one row for all images, or one each as (N, 1, 4).
_NMS_IMAGE_SIZES = (
    """
    sizes = Concat <axis = 0> (size, size)
""",
    """
    sizes_row = Concat <axis = 1> (image_size, image_size)
    sizes = Unsqueeze (sizes_row, one)
""",
)

_NMS_DISTANCE = """
    relative = Div (box, sizes)
    left, top, right, bottom = Split <axis = 2> (relative, edges)
    left_row = Transpose <perm = [0, 2, 1]> (left)
    top_row = Transpose <perm = [0, 2, 1]> (top)
    right_row = Transpose <perm = [0, 2, 1]> (right)
    bottom_row = Transpose <perm = [0, 2, 1]> (bottom)
    outer_left = Min (left, left_row)
    outer_right = Max (right, right_row)
    outer_width = Sub (outer_right, outer_left)
    outer_width2 = Mul (outer_width, outer_width)
    outer_top = Min (top, top_row)
    outer_bottom = Max (bottom, bottom_row)
    outer_height = Sub (outer_bottom, outer_top)
    outer_height2 = Mul (outer_height, outer_height)
    true_diagonal2 = Add (outer_width2, outer_height2)
    diagonal2 = Max (true_diagonal2, tiny)
    x_sum = Add (left, right)
    x = Mul (x_sum, half)
    x_row = Transpose <perm = [0, 2, 1]> (x)
    dx = Sub (x, x_row)
    dx2 = Mul (dx, dx)
    y_sum = Add (top, bottom)
    y = Mul (y_sum, half)
    y_row = Transpose <perm = [0, 2, 1]> (y)
    dy = Sub (y, y_row)
    dy2 = Mul (dy, dy)
    distance2 = Add (dx2, dy2)
    ratio = Div (distance2, diagonal2)
    penalty = Pow (ratio, exponent)
    overlap = Sub (iou, penalty)
"""

_NMS_PLAIN = "    overlap = Identity (iou)\n"
_NMS_EXPONENT: dict[NmsKind, str] = {
    "greedynms": "    exponent = Constant <value_float = 0.6> ()",
    "diounms": "    exponent = Constant <value_float: float = @beta> ()",
}

# kept[i] = valid[i] and no kept[j] with suppresses[i, j]. suppresses is strictly lower triangular (only an earlier candidate
# suppresses), so this has one solution, the greedy one, and t rounds from any start settle at least the first t candidates.
# The loop ends when a round changes nothing in any image, or after as many rounds as there are candidates: exact for every
# chain of suppressions. Photographs take 4 to 7 rounds, at most 11, at a score threshold of 0.001.
# Sums of zeros and ones are exact in float32, so a sum above zero is at least one and relu(valid - hits) is 0 or 1.
_NMS_SUPPRESSION = """
    over = Greater (overlap, iou_threshold)
    class_column = Unsqueeze (class, two)
    class_row = Unsqueeze (class, one)
    same_class = Equal (class_column, class_row)
    candidate_count = Squeeze (candidates)
    position = Range (zero_scalar, candidate_count, one_scalar)
    position_column = Unsqueeze (position, one)
    later = Greater (position_column, position)
    later_same_class = And (same_class, later)
    suppresses_bool = And (over, later_same_class)
    suppresses = CastLike (suppresses_bool, boxes)
    valid_bool = Greater (score, lowest)
    valid_row = CastLike (valid_bool, boxes)
    valid = Unsqueeze (valid_row, two)
    begin = Constant <value = bool {1}> ()
    kept = Loop (candidate_count, begin, valid) <
        body = round (int64 number, bool go, float[?, ?, 1] old) => (bool moved, float[?, ?, 1] new) {
        hits = MatMul (suppresses, old)
        room = Sub (valid, hits)
        new = Relu (room)
        change = Sub (new, old)
        changes = ReduceL1 <keepdims = 0> (change)
        moved = Greater (changes, zero_float)
    } >
"""

# The detections are in the candidates' own order: their keys count down and are all different.
_NMS_OUTPUT = """
    kept_row = Squeeze (kept, two)
    countdown_int = Sub (candidates, position)
    countdown = CastLike (countdown_int, boxes)
    short_key = Mul (kept_row, countdown)
    max_detections_scalar = Constant <value_int: int = @max_detections> ()
    max_detections = Reshape (max_detections_scalar, one)
    signed_missing = Sub (max_detections, candidates)
    missing = Max (signed_missing, zero)
    pads = Concat <axis = 0> (zero, zero, zero, missing)
    key = Pad (short_key, pads)
    top_key, top_place = TopK (key, max_detections)
    found = Greater (top_key, zero_float)
    found_int = CastLike (found, top_place)
    slot = Mul (top_place, found_int)
    slot_index = Unsqueeze (slot, two)
    score_column = Unsqueeze (score, two)
    class_float = CastLike (class_column, boxes)
    candidate = Concat <axis = 2> (box, score_column, class_float)
    picked = GatherND <batch_dims = 1> (candidate, slot_index)
    found_column = Unsqueeze (found, two)
    detection = Where (found_column, picked, zero_float)
    detection_parts = Concat <axis = 0> (four, one, one)
    detected_boxes, detected_score, detected_class = Split <axis = 2> (detection, detection_parts)
    detected_scores = Squeeze (detected_score, two)
    detected_class_float = Squeeze (detected_class, two)
    detected_classes = Cast <to = 6> (detected_class_float)
    count = ReduceSum (found_int, one)
    num_detections = Cast <to = 6> (count)
"""

# Sizes are (2), x before y; sizes of one axis are (1).
_FIT_BEGIN = """
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    both = Constant <value_ints = [1, 1]> ()
    zero_scalar = Constant <value_int = 0> ()
    one_scalar = Constant <value_int = 1> ()
    two_scalar = Constant <value_int = 2> ()
    zero_float = Constant <value_float = 0.0> ()
    one_float = Constant <value_float = 1.0> ()
    half = Constant <value_float = 0.5> ()
    full_level = Constant <value_float = 255.0> ()
    input_size = Constant <value_ints: ints = @input_size> ()
    width = Shape <start = 2, end = 3> (images)
    height = Shape <start = 1, end = 2> (images)
    size = Concat <axis = 0> (width, height)
    size_float = Cast <to = 1> (size)
    input_size_float = Cast <to = 1> (input_size)
"""

_FIT_INNER_STRETCH = "    inner_size = Identity (input_size)\n"

# The axis with the smaller ratio is filled; the other one's size is at least 1.
_FIT_INNER_LETTERBOX = """
    ratio = Div (input_size_float, size_float)
    ratio_x, ratio_y = Split <axis = 0> (ratio, both)
    fills_width = Less (ratio_x, ratio_y)
    input_width, input_height = Split <axis = 0> (input_size, both)
    height_product = Mul (height, input_width)
    shrunk_height = Div (height_product, width)
    width_product = Mul (width, input_height)
    shrunk_width = Div (width_product, height)
    free_width = Where (fills_width, input_width, shrunk_width)
    free_height = Where (fills_width, shrunk_height, input_height)
    free_size = Concat <axis = 0> (free_width, free_height)
    inner_size = Max (free_size, one)
"""

# Of an axis: the two old pixels that each new one lies between, and how far from the first to the second; the last new pixel
# is the last old one. Outside the inner image the nearest pixel of it is taken, and covered later.
_FIT_TAPS = Template("""
    ${axis}_index = Constant <value_int = $index> ()
    ${axis}_size = Gather (size, ${axis}_index)
    ${axis}_inner = Gather (inner_size, ${axis}_index)
    ${axis}_input = Gather (input_size, ${axis}_index)
    ${axis}_last = Sub (${axis}_size, one_scalar)
    ${axis}_inner_last = Sub (${axis}_inner, one_scalar)
    ${axis}_range = Range (zero_scalar, ${axis}_input, one_scalar)
    ${axis}_rest = Sub (${axis}_input, ${axis}_inner)
    ${axis}_offset = Div (${axis}_rest, two_scalar)
    ${axis}_free = Sub (${axis}_range, ${axis}_offset)
    ${axis}_bounded = Max (${axis}_free, zero_scalar)
    ${axis}_place = Min (${axis}_bounded, ${axis}_inner_last)
    ${axis}_is_inside = Equal (${axis}_free, ${axis}_place)
    ${axis}_is_last = Equal (${axis}_place, ${axis}_inner_last)
    ${axis}_steps = Max (${axis}_inner_last, one_scalar)
    ${axis}_steps_float = Cast <to = 1> (${axis}_steps)
    ${axis}_last_float = Cast <to = 1> (${axis}_last)
    ${axis}_scale = Div (${axis}_last_float, ${axis}_steps_float)
    ${axis}_place_float = Cast <to = 1> (${axis}_place)
    ${axis}_position = Mul (${axis}_place_float, ${axis}_scale)
    ${axis}_whole = Floor (${axis}_position)
    ${axis}_whole_int = Cast <to = 7> (${axis}_whole)
    ${axis}_part = Sub (${axis}_position, ${axis}_whole)
    ${axis}_first = Where (${axis}_is_last, ${axis}_last, ${axis}_whole_int)
    ${axis}_next = Add (${axis}_first, one_scalar)
    ${axis}_second = Min (${axis}_next, ${axis}_last)
    ${axis}_fraction = Where (${axis}_is_last, zero_float, ${axis}_part)
""")

_FIT_ROWS = """
    first_rows = Gather <axis = 1> (images, y_first)
    second_rows = Gather <axis = 1> (images, y_second)
"""

_FIT_CORNER = Template("""
    ${row}_${column}_pixels = Gather <axis = 2> (${row}_rows, x_${column})  # (N, H, W, 3)
    ${row}_${column}_levels = Cast <to = 1> (${row}_${column}_pixels)
""")

_FIT_RGB = Template("    $corner = Div (${corner}_levels, full_level)\n")

# stb_image's luma; floats are exact here
_FIT_GRAY = Template("""
    ${corner}_weights = Constant <value_floats = [77.0, 150.0, 29.0]> ()
    ${corner}_channel = Constant <value_ints = [3]> ()
    ${corner}_parts = Mul (${corner}_levels, ${corner}_weights)
    ${corner}_sum = ReduceSum (${corner}_parts, ${corner}_channel)
    ${corner}_divisor = Constant <value_float = 256.0> ()
    ${corner}_quotient = Div (${corner}_sum, ${corner}_divisor)
    ${corner}_luma = Floor (${corner}_quotient)
    $corner = Div (${corner}_luma, full_level)
""")

_FIT_MIX = """
    across = Unsqueeze (x_fraction, one)
    across_rest = Sub (one_float, across)
    first_left = Mul (first_first, across_rest)
    first_right = Mul (first_second, across)
    first_mixed = Add (first_left, first_right)
    second_left = Mul (second_first, across_rest)
    second_right = Mul (second_second, across)
    second_mixed = Add (second_left, second_right)
    down_axes = Constant <value_ints = [1, 2]> ()
    down = Unsqueeze (y_fraction, down_axes)
    down_rest = Sub (one_float, down)
    upper = Mul (first_mixed, down_rest)
    lower = Mul (second_mixed, down)
    resized = Add (upper, lower)
    fitted = Transpose <perm = [0, 3, 1, 2]> (resized)
"""

_FIT_FULL = "    pixels = Identity (fitted)\n"
_FIT_CANVAS = """
    y_is_inside_column = Unsqueeze (y_is_inside, one)
    is_inside = And (y_is_inside_column, x_is_inside)
    pixels = Where (is_inside, fitted, half)
"""

_FIT_PLACEMENT = """
    inner_size_float = Cast <to = 1> (inner_size)
    batch = Shape <start = 0, end = 1> (images)
    image_size_shape = Concat <axis = 0> (batch, two)
    image_size = Expand (inner_size_float, image_size_shape)
    border = Sub (input_size_float, inner_size_float)
    offset = Mul (border, half)
    scale = Div (size_float, inner_size_float)
    numbers = Concat <axis = 0> (offset, offset, scale, scale, size_float, size_float)
    placement_shape = Constant <value_ints = [3, 4]> ()
    placement = Reshape (numbers, placement_shape)
"""

_PLACE_BOXES = """
    rows = Constant <value_ints = [1, 1, 1]> ()
    offset, scale, edges = Split <axis = 0> (placement, rows)
    zero_float = Constant <value_float = 0.0> ()
    inner = Sub (boxes, offset)
    unbounded = Mul (inner, scale)
    not_negative = Max (unbounded, zero_float)
    placed = Min (not_negative, edges)
"""
