"""Predictions of an exported network for one picture.

Needs jax, flatbuffers and pillow.

python examples/stablehlo.py runs/NAME/export/model.stablehlo picture.jpg
"""

import sys

import jax
import numpy as np
from PIL import Image

with open(sys.argv[1], 'rb') as file:
  network = jax.export.deserialize(bytearray(file.read()))
_, rows, columns, _ = network.in_avals[0].shape
picture = Image.open(sys.argv[2]).convert('RGB').resize((columns, rows))
images = np.asarray(picture, np.float32)[None] / 255
for task, prediction in network.call(images).items():
  print(task, np.asarray(prediction)[0])
