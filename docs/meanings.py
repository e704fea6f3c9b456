"""What keys mean, in the words of those who fill them in. Types, defaults and ranges come from the code (make.py).

A key is (table, name) or (method, name) or (model, name), or a name alone where it means the same everywhere.
"""

STUDY_INTRO = """
# The study file

A study is one TOML file. Every key has a default but where the scans are, so a study can be three lines:

```toml
name = "first"

[data]
cases = "scans"
```

A wrong key or value is refused before any scan is opened, in one sentence that names the file, the line, what was
probably meant and what is allowed. On the command line, `--set train.rounds=3` changes one key and `--data FOLDER` says
where the scans are. The resolved study, every default filled in, lies in the run's folder as `study.json` with its
hash: two files that mean the same have the same hash, and a run goes on only under the study it began with.

How a study is written, step by step: [the guide](guide.md).
"""

FREE_TABLES = (
    """
## [method]

`name` is one of [the methods](methods.md); it is `"fedavg"` where nothing is said. All other keys are that method's
hyperparameters.

```toml
[method]
name = "fedprox"
mu = 0.1
```
""",
    """
## [methods.NAME]

Hyperparameters of another method, for when `fedscan compare` or `run.baselines` runs that one on the same study.

```toml
[methods.fedadam]
eta = 0.03
```
""",
    """
## [model]

`name` is one of [the models](models.md); where nothing is said it is the network that the method is published with,
and else `"unet"`. `preset` sets several options at once; all other keys are the network's own options. A network that
needs to know the grid takes it from `[data]`.

```toml
[model]
name = "fedsegnet"
preset = "small"
```
""",
)

STUDY = {
    ("", "name"): "what reports call the study; the file's name where nothing is said",
    ("", "seed"): "from it follow the first weights, the splits, the order of batches and every augmentation",
    ("data", "cases"): "a table of cases (`cases.csv`) or a folder in a known layout, relative to the study file; "
    '`"demo"` for the simulated hospitals',
    ("data", "sites"): "the hospitals that take part; all, where nothing is said",
    ("data", "sequences"): "the channels, in order (T1, FLAIR, ...); all that the cases have, where nothing is said",
    ("data", "require"): "sequences that a case must have; others may be missing and become a zero channel",
    ("data", "grid"): "voxels (depth, height, width) to which every scan is resampled, whatever its spacing",
    ("data", "spacing"): 'mm per voxel (depth, height, width) to which scans are resampled, or `"native"`; excludes '
    "`grid`",
    ("data", "patch"): "voxels cut from a case in training, and the window that slides over whole cases in prediction; "
    "whole cases, where nothing is said",
    ("data", "foreground"): "the share of patches that are centred on a labelled voxel",
    (
        "data",
        "seed",
    ): "of the split into train, validation and test, and of the partition; the study's, where nothing is said",
    ("data", "normalise"): "grey values to zero mean and unit spread over the volume, over its voxels that are not 0, "
    "or by the CT window; or left as they are",
    ("data", "ct_window"): "Hounsfield units (low, high) to which values are clipped before normalising",
    ("data", "ct_mean"): "Hounsfield units taken away after clipping; the middle of the window, where nothing is said",
    ("data", "ct_sd"): "Hounsfield units divided by; half the window's width, where nothing is said",
    ("data", "label_interpolation"): "how label maps are resampled: each label smoothly and then the most likely, or "
    "the nearest voxel",
    ("data", "dtype"): "of prepared images on disk; float16 takes half the space",
    ("data", "fractions"): "of patients in train, validation and test, at each hospital",
    ("data", "left_out_limit"): "how many cases may be unusable: a share (0.1) or a number (3); beyond it the study "
    "stops",
    ("data", "augment"): "whether training cases are changed at random, as `[data.augmentation]` says",
    ("data.partition", "how"): "cases stay at their true hospitals, or are dealt to simulated ones of unlike labels, "
    "sizes, intensities or lesion sizes; always by patient",
    ("data.partition", "sites"): "how many simulated hospitals",
    ("data.partition", "by"): 'for "dirichlet", what is skewed: a patient\'s commonest label, or thirds of its label '
    "volume",
    ("data.partition", "labels"): 'for "lesion-size" and `by = "volume"`: the values in label files that count; all',
    ("data.partition", "sequence"): 'for "intensity": the sequence that is measured; the first',
    ("data.partition", "alpha"): "of the Dirichlet distribution: small for hospitals that differ much",
    ("data.partition", "law"): 'for "quantity": how the sizes of hospitals are drawn',
    ("data.partition", "exponent"): 'for `law = "power"`: site k gets a share of k to the minus this',
    ("data.partition", "minimum"): "the fewest patients a hospital may have",
    ("data.augmentation", "rotate"): "largest angle in degrees, for all axes or one per axis",
    ("data.augmentation", "elastic"): "control points this many voxels apart are moved by up to this many voxels",
    ("data.augmentation", "flip"): "axes that may be mirrored; -1 is left and right",
    ("data.augmentation", "shift"): "largest translation, as a share of each edge",
    ("data.augmentation", "scale"): "range of enlargement",
    ("data.augmentation", "probability"): "of a warp, of each flip, of a change of intensity",
    ("data.augmentation.intensity", "gamma"): "range of the exponent that bends grey values",
    ("data.augmentation.intensity", "contrast"): "range of the factor that spreads grey values",
    ("data.augmentation.intensity", "brightness"): "largest value added or taken away, in standard deviations",
    ("data.augmentation.intensity", "noise"): "largest standard deviation of added noise, in standard deviations",
    ("task", "kind"): "what is learned",
    (
        "task",
        "labels",
    ): "names of the structures and their values in label files: `tumour = 1`, or a region of several, "
    "`whole = [1, 2, 4]`; where nothing is said, as the data name them. Voxels labelled `ignore` are left out of "
    "training and scores",
    ("task", "lam"): "weight of the Dice part of the loss; cross-entropy has the rest",
    ("task", "denominator"): "of the Dice part: with squared probabilities or plain ones",
    ("task", "smooth"): "added above and below in the Dice part, so that an absent structure is no division by 0",
    ("task", "include_background"): "whether the background counts in the Dice part",
    ("task", "batch_dice"): "one Dice over all cases of a batch together, instead of the mean of each one's",
    ("train", "optimiser"): "of the local steps",
    ("train", "lr"): "learning rate of round 1",
    ("train", "momentum"): "of SGD",
    ("train", "weight_decay"): "pull of the weights towards 0",
    ("train", "schedule"): "how the learning rate falls over the rounds",
    ("train", "epochs"): "passes over a hospital's training cases in one round",
    ("train", "batch"): "cases in a batch",
    ("train", "precision"): "of the forward pass; weights stay float32",
    ("train", "compile"): "whether the network is compiled (`torch.compile`): slower to start, faster after",
    ("train", "accumulate"): "batches whose gradients are averaged before a step",
    ("train", "clip"): "largest norm of the gradients",
    ("train", "moments"): "what becomes of the optimiser's memory after a round: forgotten, kept at the hospital, "
    "averaged at the server, or sent along with the model; where nothing is said, as [the method's card](methods.md) "
    "has it",
    ("train", "rounds"): "rounds of the study",
    ("run", "every"): "validate after every so many rounds; 0 for never",
    ("run", "absent"): "when too few hospitals answer: skip the round, wait, or stop (and resume later)",
    ("run", "threads"): "of each site's arithmetic; one gives the same bits for any number of workers",
    ("run", "device"): "what trains",
    ("run", "mode"): '"exact" promises the same bits every time, "fast" does not (on a GPU)',
    ("run", "silent"): "simulated silence: the rounds in which a hospital does not answer, as `Alder = [2, 3]`",
    ("run", "seconds"): "simulated seconds a hospital takes to answer a question nobody waits for (`fedasync`): what "
    "decides who is faster; one for each of its training cases, where nothing is said",
    ("run", "baselines"): 'methods that are run too, for the report to compare with: `["local-only", "centralised"]`',
    ("scores", "tolerance"): "mm per structure within which surfaces count as agreeing; a structure without one gets "
    "no surface Dice",
    ("scores", "hd95"): "[which definition](metrics.md#hd95) of HD95",
    ("scores", "penalty"): "what HD95 is where one of the two masks is empty: the diagonal of the image, for rankings; "
    "where nothing is said, it is [undefined](metrics.md#empty-masks)",
}

METHOD = {
    "clients": "hospitals per round, drawn anew each round; all, where nothing is said",
    ("fedavg", "weights"): "a hospital counts by its training cases, or all count the same",
    "mu": "strength of the pull towards the model that was received; 0 is FedAvg",
    "stragglers": "the share of a round's hospitals, drawn anew, that do only a part of their work; "
    "the paper has 0, 0.5 and 0.9",
    "work": "the part of the local epochs that a hospital does in every round, as `Alder = 0.25`; "
    "all, where nothing is said",
    "unit": "whether a part of the work is rounded up to whole epochs, as in the paper, or to batches",
    "late": "whether the part that stragglers did is kept, or they are left out, as the paper's FedAvg does",
    "norms": "which normalisation layers stay at home: all, or batch normalisation alone, of which the paper speaks",
    "eta": "the server's learning rate",
    ("fedsegnet", "eta"): 'the server\'s learning rate, with `server = "adam"`',
    ("fedsegnet-no-transformer", "eta"): 'the server\'s learning rate, with `server = "adam"`',
    ("fedavgm", "beta"): "the server's momentum; 0 is FedAvg",
    "dampening": "the share of an update that is left out when it joins the momentum",
    "beta1": "decay of the first moment",
    "beta2": "decay of the second moment",
    "tau": "added below the fraction: how far the server adapts its rate per entry",
    "order": "in which hospitals are visited: their own, drawn anew each round, or drawn so that no round begins where "
    "the model was last trained",
    "wakes": "hospitals that wake in a round, one after another, each at most once; all, where nothing is said",
    ("fedasync", "alpha"): "how much a model counts that is mixed in as soon as it was made",
    "staleness": "how that falls with age: not at all, as (1 + age)^-a, or, beyond b, as 1 / (a (age - b) + 1); age "
    "counts the models that were mixed in meanwhile",
    ("fedasync", "a"): "the number in that rule; where nothing is said, 0.5 as a power and 10 in the hinge",
    "b": "the age from which the hinge falls; 4, where nothing is said",
    "rho": "strength of the pull towards the model that was received; 0 for none",
    "oldest": "the age beyond which a model is not mixed in at all; no limit, where nothing is said",
    "arrivals": "models that end a round; as many as hospitals, where nothing is said",
    "aggregation": "all factors of the weights; all, with the quality that the other hospitals find; the divergence "
    "alone (eq. 17); or cases alone (eq. 13)",
    "a": "how much of a hospital's quality is Dice; the rest is exp(-HD95 / h)",
    "h": "mm of HD95 at which that part of quality has fallen to 1/e",
    "alpha": "weight of quality; 0 leaves it out",
    "beta": "weight of divergence: hospitals whose update is longer than the median count less; 0 leaves it out",
    "gamma": "weight of diversity, the evenness of the structures' volumes; 0 leaves it out",
    "c": "exponent of the number of cases; 0 leaves it out",
    "cosine": "whether divergence also looks at the direction of an update",
    "w_min": "the least share a hospital may have",
    "w_max": "the largest share a hospital may have",
    "ema": "how much of the share that it had when it last took part is kept; 0 for none",
    "fraction": "of each parameter's entries that are sent up, largest first; 1 for all; `{ above = 0.001 }` for those "
    "of a larger magnitude, be they many or none",
    "bits": "of each value sent up; 32 for no rounding",
    "feedback": "whether what was held back is added to the next update",
    "down_fraction": "as `fraction`, for the way down; the whole model is sent to a hospital that missed a round",
    "down_bits": "as `bits`, for the way down",
    "server": "plain averaging, or an Adam step at the server",
}

MODEL = {
    "widths": "channels per level, from the finest; each level halves the grid",
    "norm": "normalisation after each convolution",
    "transformer": "whether there is one at the deepest level; without it this is the U-Net",
    ("fedsegnet", "layers"): "of the transformer",
    ("fedsegnet", "heads"): "of its attention; they must divide the deepest width",
    ("unetr", "heads"): "of its attention; they must divide `hidden_size`",
    ("swin-unetr", "heads"): "of the attention of each level",
    "dropout": "share of features set to 0 in training",
    ("fedsegnet", "grid"): "of training, in voxels: positions are learned for it and interpolated on others",
    ("unetr", "grid"): "of all images, in voxels: this network takes no other",
    ("unetr", "feature_size"): "channels of the finest level",
    ("swin-unetr", "feature_size"): "channels of the finest level; 12 must divide it",
    "hidden_size": "entries of a token",
    "mlp_size": "entries inside a transformer layer's MLP",
    "depths": "transformer layers per level",
    "window": "tokens along a side of an attention window",
}
