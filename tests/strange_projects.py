"""A dozen small projects as people write them, which fit the callbacks' defaults badly: modules, and their loaders."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F  # noqa: N812 (as everybody calls it)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


class Project(pl.LightningModule):
    """Trains its loss by Adam."""

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-3)


class Autoencoder(Project):
    """Lightning's own example: the forward is the encoder, of images that ``training_step`` flattens."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 36))

    def forward(self, x):
        return self.encoder(x)

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)


class GAN(pl.LightningModule):
    """Two optimisers by hand; the forward takes noise, and the batches hold images."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 36))
        self.discriminator = nn.Sequential(nn.Linear(36, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def forward(self, z):
        return self.generator(z)

    def training_step(self, batch, batch_idx):
        real = batch[0].flatten(1)
        for optimizer, sign in zip(self.optimizers(), (1.0, -1.0), strict=True):
            fake = self(torch.randn(len(real), 4))
            loss = F.softplus(-sign * self.discriminator(fake)).mean()
            optimizer.zero_grad()
            self.manual_backward(loss + F.softplus(-self.discriminator(real)).mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.generator, self.discriminator)]


class VAE(Project):
    """Draws in each pass, and its forward gives a tuple."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(36, 4), nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 36))

    def forward(self, x):
        mean, log_scale = self.encoder(x.flatten(1)).chunk(2, 1)
        return self.decoder(mean + log_scale.exp() * torch.randn_like(mean)), mean, log_scale

    def training_step(self, batch, batch_idx):
        x, mean, log_scale = self(batch[0])
        divergence = (mean.square() + (2 * log_scale).exp() - 2 * log_scale - 1).sum(1).mean()
        return F.mse_loss(x, batch[0].flatten(1)) + 0.01 * divergence


class UNet(Project):
    """Batches are dicts with images and masks."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(5, 1, 3, padding=1)

    def forward(self, x):
        deep = F.interpolate(F.max_pool2d(F.relu(self.down(x)), 2), scale_factor=2)
        return self.up(torch.cat([x, deep], 1))

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch["image"]), batch["mask"])


class SimCLR(Project):
    """Batches hold two views of each sample, and the loss is of the batch as a whole."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4))

    def training_step(self, batch, batch_idx):
        (a, b), _ = batch
        z = F.normalize(self.net(torch.cat([a, b]).flatten(1)), dim=1)
        similar = (z @ z.T / 0.5).fill_diagonal_(-1e9)
        return F.cross_entropy(similar, torch.arange(len(z)).roll(len(a)))


class Flow(Project):
    """Smooth: it has no kink."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))

    def training_step(self, batch, batch_idx):
        a, b = batch[0][:, 0, :2], batch[0][:, 1, :2]
        shift, scale = self.net(a).chunk(2, 1)
        z = b * scale.tanh().exp() + shift
        return (0.5 * z.square() - scale.tanh()).sum(1).mean()


class GRU(Project):
    """Forecasts sequences of several lengths, which its collate function pads and packs."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 1)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.gru(packed)[1][0]).squeeze(1)

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        return F.mse_loss(self(x, lengths), y)


class Transformer(Project):
    """Tokens in a dict, of which padding is left out of the loss."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 7)

    def training_step(self, batch, batch_idx):
        hidden = self.layer(self.embed(batch["tokens"]))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), batch["labels"].flatten(), ignore_index=0)


class GNN(Project):
    """Graphs of several sizes, whose nodes a batch holds one behind another."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, nodes, graph, num_graphs):
        hidden = F.relu(self.first(nodes))
        return self.head(torch.zeros(num_graphs, 8).index_add(0, graph, hidden)).squeeze(1)

    def training_step(self, batch, batch_idx):
        nodes, graph, y = batch
        return F.mse_loss(self(nodes, graph, len(y)), y)


class PINN(Project):
    """The loss takes derivatives by the inputs."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Softplus(), nn.Linear(8, 1))

    def forward(self, t):
        return self.net(t)

    def training_step(self, batch, batch_idx):
        t = batch[0][:, 0, :1].clone().requires_grad_()
        u = self(t)
        (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        return (du + u).square().mean() + (self(torch.zeros(1, 1)) - 1).square().sum()


class DQN(Project):
    """Its data are what it plays itself: an ``IterableDataset`` that changes the module's replay buffer."""

    def __init__(self):
        super().__init__()
        self.net, self.target = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
        self.played = 0

    def forward(self, state):
        return self.net(state)

    def training_step(self, batch, batch_idx):
        state, action, reward, after = batch
        with torch.no_grad():
            goal = reward + 0.9 * self.target(after).amax(1)
        return F.smooth_l1_loss(self.net(state).gather(1, action[:, None]).squeeze(1), goal)


class Finetuning(Project):
    """A frozen backbone in eval mode, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU())
        for parameter in self.backbone.parameters():
            parameter.requires_grad = False
        self.head = nn.Linear(8, 3)

    def on_train_epoch_start(self):
        self.backbone.eval()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.backbone(x)), y)


class Plays(IterableDataset):
    """Plays of a module."""

    def __init__(self, module):
        self.module = module

    def __iter__(self):
        for _ in range(24):
            self.module.played += 1
            yield torch.randn(3), torch.randint(2, ()), torch.randn(()), torch.randn(3)


def padded(samples):
    """A batch of sequences: padded, and how long each is."""
    xs, ys = zip(*samples, strict=True)
    lengths = torch.tensor([len(x) for x in xs])
    return nn.utils.rnn.pad_sequence(xs, batch_first=True), lengths, torch.stack(ys)


def joined(samples):
    """A batch of graphs: nodes, to which graph each belongs, targets."""
    xs, ys = zip(*samples, strict=True)
    return torch.cat(xs), torch.cat([torch.full((len(x),), i) for i, x in enumerate(xs)]), torch.stack(ys)


def project(name):
    """A fresh module of a class's name here, and its training loader."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 1, 6, 6, generator=generator)
    labels = torch.randint(3, (24,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = globals()[name]()
    samples, collate = [*zip(images, labels, strict=True)], None
    match name:
        case "UNet":
            samples = [{"image": image, "mask": (image > 0).float()} for image in images]
        case "SimCLR":
            samples = [((image, image.flip(-1)), label) for image, label in samples]
        case "GRU" | "GNN":
            lengths = torch.randint(2, 7, (24,), generator=generator).tolist()
            samples = [(image[0, :n], image.mean()) for image, n in zip(images, lengths, strict=True)]
            collate = padded if name == "GRU" else joined
        case "Transformer":
            tokens = torch.randint(1, 7, (24, 5), generator=generator)
            tokens[::2, 3:] = 0
            samples = [{"tokens": row, "labels": row} for row in tokens]
        case "Flow" | "PINN":
            samples = TensorDataset(images[:, 0])
        case "DQN":
            return module, DataLoader(Plays(module), batch_size=8)
    return module, DataLoader(samples, batch_size=8, collate_fn=collate, shuffle=True)


PROJECTS = tuple(kind.__name__ for kind in (Autoencoder, GAN, VAE, UNet, SimCLR, Flow, GRU, Transformer, GNN, PINN, DQN, Finetuning))  # fmt: skip # noqa: E501
