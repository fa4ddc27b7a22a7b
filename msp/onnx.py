"""A trained network as ONNX; needs the packages of requirements-onnx.txt."""

from collections.abc import Callable

import jax
import jax2onnx
import numpy as np
import onnxruntime
from jax2onnx.plugins import plugin_system
from jax2onnx.plugins._ir_shapes import _stamp_type_and_shape
from jax2onnx.plugins.jax.lax import pad as _theirs  # noqa: F401  overridden below

INPUT = 'images'


@plugin_system.register_primitive(jaxpr_primitive=jax.lax.pad_p.name)
class _Pad(plugin_system.PrimitiveLeafPlugin):
  """`lax.pad` with a symbolic batch, which jax2onnx 0.17.1 takes for a number."""

  def lower(self, ctx, eqn):
    (out,) = eqn.outvars
    x, fill = (
      ctx.get_value_for_var(var, name_hint=ctx.fresh_name('pad_in'))
      for var in eqn.invars
    )
    low, high, _ = zip(*eqn.params['padding_config'], strict=True)
    pads = ctx.builder.add_initializer_from_array(
      name=ctx.fresh_name('pads'), array=np.array(low + high, np.int64)
    )
    result = ctx.builder.Pad(
      x, pads, fill, mode='constant', _outputs=[ctx.fresh_name('pad')]
    )
    result.type = x.type
    _stamp_type_and_shape(result, out.aval.shape)
    ctx.bind_value_for_var(out, result)


def serialize(predict: Callable, image_shape: tuple[int, int, int]) -> bytes:
  """ONNX of a function of images, for any number of them.

  Args:
    predict: from `msp.export.predictor`.
    image_shape: (H, W, 3).

  Returns:
    The content of a file: input `images`, an output for each task by its name.
  """
  images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
  names = sorted(jax.eval_shape(predict, images))
  model = jax2onnx.to_onnx(
    lambda x: tuple(predict(x)[name] for name in names),
    [('batch', *image_shape)],
    input_names=[INPUT],
    output_names=names,
  )
  return model.SerializeToString()


def run(content: bytes, images: np.ndarray) -> dict[str, np.ndarray]:
  """Predictions of what `serialize` gave, in ONNX Runtime, for images (B, H, W, 3)."""
  session = onnxruntime.InferenceSession(content, providers=['CPUExecutionProvider'])
  names = [output.name for output in session.get_outputs()]
  return dict(zip(names, session.run(names, {INPUT: images}), strict=True))
