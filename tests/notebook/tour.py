# %% [markdown]
# # elmo_ray from Python
#
# A tour of the calls: train a small model on the sample text, measure it, write vectors, and use it as a layer in
# PyTorch. It takes a minute or two on two cores, downloads nothing, and does without Ray (`cluster.workers=0`).
#
# The tour is the script `tests/notebook/tour.py`, which `python tests/notebook/tour.py` runs. With
# `pip install 'elmo-ray[notebook]'` these commands make a notebook with its results, and from it the page
# `tests/notebook/README.md`:
# ```
# jupytext --from py:percent --to ipynb --set-kernel python3 --execute tests/notebook/tour.py -o tour.ipynb
# jupyter nbconvert --to markdown --stdout tour.ipynb > tests/notebook/README.md
# ```

# %%
import shutil
import tempfile
from pathlib import Path

import h5py
import torch

from elmo_ray import Elmo, LanguageModel, api

folder = Path(tempfile.mkdtemp())
here = {"cluster": {"workers": 0}, "run": {"storage_path": folder}}

# %% [markdown]
# ## Train
#
# The first argument is a YAML file or the name of a configuration that comes with the package. Settings replace those
# of the file; they have the same names as on the command line. The sample text is prose from Python's documentation.

# %%
trained = api.pretrain("quickstart", **here, **{"train.duration": "200 steps", "train.validate_every": "100 steps"})

print(f"{trained.steps} steps, {trained.positions:,} positions")
print(f"perplexity of the test text: {trained.perplexity:.0f}")
print("exported:", *sorted(path.name for path in Path(trained.export_dir).iterdir()))

# %% [markdown]
# ## Measure
#
# Perplexity on held-out text: here that of the sample, otherwise a file, a glob or a list of them.

# %%
measured = api.evaluate(trained.run_dir, "sample", **here)

print(f"forward {measured.perplexity_forward:.0f}, backward {measured.perplexity_backward:.0f}")
print(f"{measured.positions:,} positions, {measured.oov_rate:.1%} of the words unknown")

# %% [markdown]
# ## Write vectors
#
# `embed` reads a tokenised sentence from each line, and writes an HDF5 file or a folder of Parquet files.

# %%
text = folder / "text.txt"
text.write_text("The function returns a list .\nA list of files is returned .\n")
written = api.embed(trained.run_dir, text, folder / "vectors.hdf5", embed={"layers": "all"}, cluster={"workers": 0})

print(f"{written.words} words of {written.sentences} sentences")
with h5py.File(written.out) as file:
    print("first sentence, [layers, words, dimensions]:", file["0"].shape)

# %% [markdown]
# ## Use it in PyTorch
#
# `Elmo` gives a mixture of the layers, whose weights are learned with your model. `encode` makes its inputs from words.

# %%
sentences = [line.split() for line in text.read_text().splitlines()]
elmo = Elmo.from_run(trained.run_dir, stateful=False, dropout=0.0)
with torch.no_grad():
    output = elmo(elmo.encode(sentences))
(vectors,) = output["elmo_representations"]

print("[sentences, words, dimensions]:", tuple(vectors.shape))
print("words:", output["mask"].sum(dim=1).tolist())
alike = torch.cosine_similarity(vectors[0, 4], vectors[1, 1], dim=0)
print(f"'list' in both sentences: cosine {alike:.2f}")

# %% [markdown]
# ## Ask for words
#
# A run also has its softmax, and so the probabilities of words: which words does the model expect in each place?

# %%
model = LanguageModel.from_run(trained.run_dir)
(found,) = model.substitutes([sentences[0]], k=3)
for word, likely in zip(sentences[0], found.words(), strict=True):
    print(f"{word:<10}{', '.join(likely)}")

# %% [markdown]
# Nothing else was written than the folder of this tour.

# %%
shutil.rmtree(folder)
