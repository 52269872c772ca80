"""Small LightningModules as other projects write them, in either namespace of Lightning, and data to train them on."""

import functools
import importlib

import torch
import torch.nn.functional as F  # noqa: N812 (as everybody calls it)
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import resnet18

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")
ZOO = ("mlp", "lenet", "resnet18", "gru", "transformer", "functional")  # classifiers, of batches (inputs, targets)
OTHERS = ("no_forward", "dict_batches", "manual")

# Of one sample of each.
_SHAPES = {
    "lenet": (1, 28, 28),
    "resnet18": (3, 32, 32),
    "small_resnet": (3, 32, 32),
    "gru": (7, 5),
    "transformer": (6, 4),
}
_FLAT = (8,)
_CLASSES = {"mlp": 3, "lenet": 10, "resnet18": 10, "gru": 3, "transformer": 3, "functional": 3}


def foreign_model(name, namespace="pytorch_lightning", *, num_samples=24, batch_size=8, shuffle=False, seed=0):
    """A fresh module of the zoo and a map-style loader of its training set; the seed fixes weights and data.

    The generators are as before afterwards. The loader's order, where it is shuffled, comes from torch's generator.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = _classes(namespace)[name]()
        inputs = torch.randn(num_samples, *_SHAPES.get(name, _FLAT))
        targets = torch.randint(_CLASSES.get(name, 3), (num_samples,))
    data = _Dicts(inputs, targets) if name == "dict_batches" else TensorDataset(inputs, targets)
    return module, DataLoader(data, batch_size=batch_size, shuffle=shuffle)


def foreign_trainer(namespace="pytorch_lightning", **options):
    """A Trainer of the namespace, on the CPU, that says nothing and, unless told to, writes nothing."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "log_every_n_steps": 1,
    }
    return importlib.import_module(namespace).Trainer(**defaults | options)


def cross_entropy_of(module, batch):
    """A ``loss_fn`` of the classifiers, by a name that a command line can give."""
    x, y = batch
    return F.cross_entropy(module(x), y)


class _Dicts(Dataset):
    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return {"x": self.inputs[index], "y": self.targets[index]}


@functools.cache
def _classes(namespace):  # noqa: C901 (its classes count as branches)
    pl = importlib.import_module(namespace)

    class Classifier(pl.LightningModule):
        """Cross-entropy on batches (inputs, targets), with a metric, by SGD with momentum."""

        lr = 0.05

        def __init__(self, num_classes=3):
            super().__init__()
            self.accuracy = MulticlassAccuracy(num_classes)

        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self(x)
            loss = F.cross_entropy(logits, y)
            self.accuracy(logits, y)
            self.log("train_loss", loss)
            self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    class MLP(Classifier):
        """Four layers in an nn.Sequential."""

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)
            )

        def forward(self, x):
            return self.layers(x)

    class LeNet(Classifier):
        """Convolution, ReLU and max-pooling, twice; then ReLU and dropout. It returns a dict, and has a scheduler."""

        def __init__(self):
            super().__init__(10)
            self.features = nn.Sequential(
                nn.Conv2d(1, 4, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 5), nn.ReLU()
            )
            self.hidden = nn.Linear(6 * 5 * 5, 16)
            self.dropout = nn.Dropout(0.25)
            self.output = nn.Linear(16, 10)

        def forward(self, x):
            x = F.max_pool2d(self.features(x), 2).flatten(1)
            return self.output(self.dropout(F.relu(self.hidden(x))))

        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "batch_idx": batch_idx}

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}

    class ResNet18(Classifier):
        """torchvision's, with its in-place ReLUs, batch normalisation and max-pooling, for 10 classes."""

        def __init__(self):
            super().__init__(10)
            self.model = resnet18(num_classes=10)

        def forward(self, x):
            return self.model(x)

    class SmallResNet(Classifier):
        """Two residual blocks of 4 and 8 channels, with batch normalisation; 1,100 parameters."""

        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
            self.block = nn.Sequential(
                nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, bias=False)
            )
            self.shortcut = nn.Conv2d(4, 8, 1, 2, bias=False)
            self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.stem(x)
            x = F.relu(self.norm(self.block(x) + self.shortcut(x)))
            return self.head(x.mean((2, 3)))

    class GRU(Classifier):
        """The last state of a GRU (smooth), and a head with a ReLU."""

        def __init__(self):
            super().__init__()
            self.recurrent = nn.GRU(5, 6, batch_first=True)
            self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x):
            _, last = self.recurrent(x)
            return self.head(last[0])

    class Transformer(Classifier):
        """Two encoder layers with ReLU (and softmax and dropout, which are smooth), and the mean over the sequence."""

        def __init__(self):
            super().__init__()
            self.embedding = nn.Linear(4, 8)
            layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, activation="relu", batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.output = nn.Linear(8, 3)

        def forward(self, x):
            return self.output(self.encoder(self.embedding(x)).mean(1))

    class Functional(Classifier):
        """``F.relu`` twice and ``torch.relu`` once in its forward; a list that training_step appends to."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 12)
            self.third, self.output = nn.Linear(12, 6), nn.Linear(6, 3)
            self.seen = []

        def forward(self, x):
            x = F.relu(self.second(F.relu(self.first(x))))
            return self.output(torch.relu(self.third(x)))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.seen.append(loss.detach())
            return loss

        def on_train_epoch_end(self):
            self.log("seen_loss", torch.stack(self.seen).mean())
            self.seen.clear()

    class NoForward(Classifier):
        """All of it in ``training_step``, with noise on the inputs."""

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))

        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self.layers(x + 0.01 * torch.randn_like(x))
            loss = F.cross_entropy(logits, y)
            self.accuracy(logits, y)
            self.log_dict({"train_loss": loss, "train_accuracy": self.accuracy}, prog_bar=True)
            return loss

    class DictBatches(Classifier):
        """Batches {"x": inputs, "y": targets}, which its forward takes whole."""

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 10), nn.LeakyReLU(0.1), nn.Linear(10, 3))

        def forward(self, batch):
            return self.layers(batch["x"])

        def training_step(self, batch, batch_idx):
            logits = self(batch)
            loss = F.cross_entropy(logits, batch["y"])
            self.accuracy(logits, batch["y"])
            self.log("train_loss", loss, batch_size=len(batch["y"]))
            self.log("train_accuracy", self.accuracy, batch_size=len(batch["y"]))
            return loss

    class Manual(pl.LightningModule):
        """A tiny GAN: two optimisers that ``training_step`` steps itself, and no loss that it would return."""

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
            self.discriminator = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

        def forward(self, x):
            return self.discriminator(x)

        def training_step(self, batch, batch_idx):
            real, _ = batch
            generator, discriminator = self.optimizers()
            noise = torch.randn(len(real), 4, device=self.device)
            loss = F.softplus(-self.discriminator(self.generator(noise))).mean()
            self._step(generator, loss)
            self.log("generator_loss", loss)
            loss = F.softplus(self.discriminator(self.generator(noise).detach())) + F.softplus(-self(real))
            self._step(discriminator, loss.mean())
            self.log("discriminator_loss", loss.mean())

        def _step(self, optimizer, loss):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

        def configure_optimizers(self):
            parts = (self.generator, self.discriminator)
            return [torch.optim.SGD(part.parameters(), lr=0.05) for part in parts], []

    return {
        "mlp": MLP,
        "lenet": LeNet,
        "resnet18": ResNet18,
        "small_resnet": SmallResNet,
        "gru": GRU,
        "transformer": Transformer,
        "functional": Functional,
        "no_forward": NoForward,
        "dict_batches": DictBatches,
        "manual": Manual,
    }
