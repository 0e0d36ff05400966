"""Embeddings of handwritten digits on the sphere, trained with each loss for embeddings.

Recall@1 is the fraction of images whose nearest neighbour shows the same digit. It is measured on
images that were not seen in training.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import ops

DIMENSIONS, CLASSES = 3, 10


def info_nce(embeddings, labels):
    """Each pair of neighbours in a batch shows one digit, as several other pairs do."""
    return ops.info_nce_loss(embeddings[::2], embeddings[1::2], labels=labels[::2])


LOSSES = {
    "batch-hard": lambda: ops.BatchHardTripletLoss("soft"),
    "batch-all": lambda: ops.BatchAllTripletLoss(0.5),
    "semi-hard": lambda: ops.BatchSemiHardTripletLoss(0.5),
    "InfoNCE": lambda: info_nce,
    "SupCon": lambda: ops.SupConLoss(0.1),
    "ArcFace": lambda: ops.MarginSoftmaxLoss(DIMENSIONS, CLASSES, scale=16.0),
}


def recall_at_1(embeddings, labels):
    distances = torch.cdist(embeddings, embeddings)
    nearest = distances.fill_diagonal_(torch.inf).argmin(1)
    return (labels[nearest] == labels).double().mean().item()


def train(make_loss, images, labels, steps, of_a_class=8):
    loss = make_loss()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, DIMENSIONS))
    parameters = list(model.parameters())
    if isinstance(loss, nn.Module):
        parameters += loss.parameters()  # ArcFace has a vector for each class
    optimizer = torch.optim.Adam(parameters, 1e-3)
    members = [(labels == label).nonzero()[:, 0] for label in range(CLASSES)]
    for _ in range(steps):
        batch = torch.cat([some[torch.randperm(len(some))[:of_a_class]] for some in members])
        optimizer.zero_grad()
        loss(F.normalize(model(images[batch])), labels[batch]).backward()
        optimizer.step()
    return model


def main():
    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    images = images.float() / 16
    seen = torch.arange(len(labels)) % 3 > 0
    new, of_new = images[~seen], labels[~seen]
    for name, make_loss in LOSSES.items():
        recall = []
        for steps in (0, 300):
            torch.manual_seed(0)
            model = train(make_loss, images[seen], labels[seen], steps)
            with torch.no_grad():
                recall.append(recall_at_1(F.normalize(model(new)), of_new))
        print("{:11} recall@1 {:.2f} untrained, {:.2f} trained".format(name, *recall))


if __name__ == "__main__":
    main()
