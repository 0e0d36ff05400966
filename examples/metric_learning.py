"""Embeddings of handwritten digits in the plane, trained with triplet losses.

Recall@1 is the fraction of images whose nearest neighbour shows the same digit. It is measured on
images that were not seen in training.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import ops

LOSSES = {
    "batch-hard": ops.BatchHardTripletLoss("soft"),
    "batch-all": ops.BatchAllTripletLoss(0.5),
    "semi-hard": ops.BatchSemiHardTripletLoss(0.5),
}


def recall_at_1(embeddings, labels):
    distances = torch.cdist(embeddings, embeddings)
    nearest = distances.fill_diagonal_(torch.inf).argmin(1)
    return (labels[nearest] == labels).double().mean().item()


def train(loss, images, labels, steps, of_a_class=8):
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    for _ in range(steps):
        batch = torch.cat([some[torch.randperm(len(some))[:of_a_class]] for some in members])
        optimizer.zero_grad()
        loss(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model


def main():
    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    images = images.float() / 16
    seen = torch.arange(len(labels)) % 3 > 0
    new, of_new = images[~seen], labels[~seen]
    for name, loss in LOSSES.items():
        recall = []
        for steps in (0, 300):
            torch.manual_seed(0)
            model = train(loss, images[seen], labels[seen], steps)
            with torch.no_grad():
                recall.append(recall_at_1(model(new), of_new))
        print("{:11} recall@1 {:.2f} untrained, {:.2f} trained".format(name, *recall))


if __name__ == "__main__":
    main()
