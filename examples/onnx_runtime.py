"""Predictions of an exported network for one picture; needs onnxruntime and pillow.

python examples/onnx_runtime.py runs/NAME/export/model.onnx picture.jpg
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
_, rows, columns, _ = session.get_inputs()[0].shape
picture = Image.open(sys.argv[2]).convert('RGB').resize((columns, rows))
images = np.asarray(picture, np.float32)[None] / 255
tasks = [output.name for output in session.get_outputs()]
for task, prediction in zip(tasks, session.run(tasks, {'images': images}), strict=True):
  print(task, prediction[0])
