"""RGAL's two steps and its data loading in plain form, as a reference: what the released code is described to do.

Eager fp32 in torch's default memory format; upsampling and convolution as separate layers; networks in evaluation mode
whose weights still accumulate gradients; hooks on the teacher's BatchNorm that are active in both phases; triplets as
lists of indices; the channel term on whole maps; a folder of PNG files that worker processes decode in every pass. The
labels of the triplets are given, because a teacher with random weights predicts the same class for every image.
"""

import math
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from datafree.features import FeatureTap, pooled

MARGIN, TEMPERATURE = 0.2, 20.0


def generator(nz, ngf, shape):
    """Linear, then two doublings with convolutions: latents (N, nz) -> images of shape (C, H, W)."""
    channels, height, width = shape
    base = (2 * ngf, height // 4, width // 4)
    return nn.Sequential(
        nn.Linear(nz, math.prod(base)),
        nn.Unflatten(1, base),
        nn.BatchNorm2d(2 * ngf),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2 * ngf, 2 * ngf, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * ngf),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2 * ngf, ngf, 3, padding=1, bias=False),
        nn.BatchNorm2d(ngf),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(ngf, channels, 3, padding=1),
        nn.Sigmoid(),
    )


class Statistics:
    """A hook that stores the distance of a BatchNorm layer's batch statistics to its running ones."""

    def __init__(self, layer):
        layer.register_forward_hook(self)

    def __call__(self, layer, args, output):
        rows = args[0].permute(1, 0, 2, 3).reshape(args[0].shape[1], -1)
        mean, variance = args[0].mean((0, 2, 3)), rows.var(1, unbiased=False)
        self.distance = (variance - layer.running_var).norm() + (mean - layer.running_mean).norm()


class Plain:
    """Both phases for images of ``shape`` (C, H, W), with n images per synthesis step and n views per student step."""

    def __init__(self, teacher, student, shape, ngf, n, device):
        teacher.to(device).eval()
        self.model = student.to(device)
        self.teacher, self.student = FeatureTap(teacher, shape), FeatureTap(student, shape)
        self.hooks = [Statistics(m) for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
        self.make_generator = lambda: generator(256, ngf, shape).to(device)
        self.augment = nn.Sequential(v2.RandomCrop(shape[1:], padding=4), v2.RandomHorizontalFlip())
        self.normalise = v2.Normalize([0.5] * shape[0], [0.25] * shape[0])
        pairs = zip(self.student.stage_channels, self.teacher.stage_channels)
        self.project = nn.ModuleList(nn.Conv2d(s, t, 1) for s, t in pairs).to(device)
        self.sgd = torch.optim.SGD([*student.parameters(), *self.project.parameters()], 0.1, 0.9, weight_decay=1e-4)
        self.n, self.classes, self.device = n, self.teacher.num_classes, device

    def generate(self, z):
        return self.generator(z)

    def run_teacher(self, views):
        return self.teacher(views)

    def run_student(self, views):
        return self.student(views)

    def synthesis_round(self, steps):
        self.model.eval()
        z = torch.randn(self.n, 256, device=self.device, requires_grad=True)
        targets = torch.randint(self.classes, (self.n,), device=self.device)
        self.generator, best = self.make_generator(), math.inf
        optimizer = torch.optim.Adam([z, *self.generator.parameters()], 1e-3, (0.5, 0.999))
        for _ in range(steps):
            images = self.generate(z)
            loss = self.synthesis_loss(self.normalise(self.augment(images)), targets)
            if loss.item() < best:
                best, kept = loss.item(), images.detach().clone()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return kept

    def synthesis_loss(self, views, targets):
        teacher, student = self.run_teacher(views), self.run_student(views)
        same = teacher.logits.argmax(1) == student.logits.argmax(1)
        gap = F.kl_div(F.log_softmax(student.logits, 1), F.softmax(teacher.logits, 1), reduction="none").sum(1)
        loss = sum(hook.distance for hook in self.hooks) + F.cross_entropy(teacher.logits, targets)
        triplets = sample_triplets(teacher.logits.detach(), targets)
        layers = student.stages[2:4] or student.stages[-1:]
        return loss - (gap * same).mean() + 0.1 * sum(triplet_loss(pooled(x), triplets) for x in layers)

    def student_step(self, views, labels):
        """views (N, C, H, W), normalised; labels (N,)."""
        self.model.train()
        with torch.no_grad():
            teacher = self.run_teacher(views)
        student = self.run_student(views)
        T = TEMPERATURE
        loss = (
            F.kl_div(F.log_softmax(student.logits / T, 1), F.softmax(teacher.logits / T, 1), reduction="batchmean")
            * T**2
        )
        for project, ours, theirs in zip(self.project, student.stages, teacher.stages):
            loss = loss + 0.1 * F.mse_loss(pooled(project(ours)), pooled(theirs))
        triplets = sample_triplets(student.logits.detach(), labels)
        loss = loss + 0.1 * triplet_loss(student.embed, triplets)
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()


def sample_triplets(space, labels):
    """Indices (3, T) of anchors, positives and sampled negatives, class by class."""
    rows = F.normalize(space, dim=1)
    distance = (2 - 2 * rows @ rows.T).clamp_min(1e-8).sqrt().clamp_min(0.5)
    d = rows.shape[1]
    log_weight = (2 - d) * distance.log() - (d - 3) / 2 * (1 - distance**2 / 4).clamp_min(1e-8).log()
    other = labels[:, None] != labels[None, :]
    weight = torch.exp(log_weight - log_weight.max()) * other * (distance < 1.4)
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, other.float())
    found = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if 1 < len(members) < len(labels):
            anchors, positives = (members[i] for i in (~torch.eye(len(members), dtype=torch.bool)).nonzero().T)
            negatives = weight[members].multinomial(len(members) - 1, replacement=True).flatten()
            found.append(torch.stack([anchors, positives, negatives]))
    return torch.cat(found, 1) if found else torch.zeros(3, 0, dtype=torch.long)


def triplet_loss(features, triplets):
    anchors, positives, negatives = F.normalize(features, dim=1)[triplets]
    gap = (anchors - positives).norm(dim=1) - (anchors - negatives).norm(dim=1)
    return F.relu(gap + MARGIN).mean()


class Folder(Dataset):
    """The PNG files of a folder, each as two augmented, normalised views."""

    def __init__(self, root, size):
        self.paths = sorted(Path(root).glob("*.png"))
        self.transform = v2.Compose(
            [
                v2.RandomCrop(size, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.25] * 3),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = Image.open(self.paths[index]).convert("RGB")
        return self.transform(image), self.transform(image)


def batches(root, size, n, count, workers=2):
    """``count`` batches of two views of n images each; every pass lists the folder and starts the workers again."""
    while count > 0:
        for pair in DataLoader(Folder(root, size), n, shuffle=True, num_workers=workers, drop_last=True):
            yield torch.cat(pair)
            count -= 1
            if not count:
                return
