"""HTTP service that returns predictions for an image as JSON, without PyTorch.

    pip install fastapi uvicorn python-multipart onnxruntime opencv-python-headless
    MODEL=model.onnx uvicorn service:app --port 8000
    curl -F image=@photo.jpg localhost:8000/predict

``MODEL`` is a file of tools/export.py; the folder crossformer_mm/without_torch has to be copied
beside this file.
"""

import os

import numpy as np
from fastapi import FastAPI, HTTPException, UploadFile
from without_torch.model import Model, best_classes

app = FastAPI()
model = Model(os.environ['MODEL'], os.environ.get('PROVIDER', 'cpu'))


@app.get('/about')
def about() -> dict:
    """Return the metadata of the file: classes, thresholds, version."""
    return model.about


@app.post('/predict')  # not async: the server's threads run several requests at once
def predict(image: UploadFile) -> dict:
    pixels = model.decode(image.file.read())
    if pixels is None:
        raise HTTPException(415, f"'{image.filename}' is no image that OpenCV reads.")
    found, names = model(pixels), model.about['classes']
    if model.about['task'] == 'label map':
        labels, counts = np.unique(found['labels'], return_counts=True)
        return dict(pixels={names[label]: int(n) for label, n in zip(labels, counts)})
    if model.about['task'] == 'classes':
        scores = found['scores']
        best = [dict(label=names[i], score=float(scores[i])) for i in best_classes(scores)]
        return dict(classes=best)
    objects = []
    for index, (box, score, label) in enumerate(
        zip(found['boxes'].tolist(), found['scores'].tolist(), found['labels'])
    ):
        one = dict(label=names[label], score=score, box=box)
        if 'masks' in found:
            one['area'] = int(found['masks'][index].sum())
        objects.append(one)
    return dict(objects=objects)
