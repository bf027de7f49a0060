"""Packaging of diffusers_byoc. The exact versions the tests run with stand in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup


readme = Path(__file__).parent / "README.md"
package = Path(__file__).parent / "src" / "diffusers_byoc" / "__init__.py"

extras = {
    # volumes and stacks from TIFF (imagecodecs: LZW and zstd, as microscopes write), .npy and Hugging Face data sets;
    # phantom cells
    "data": [
        *("tifffile>=2024.8.10", "imagecodecs>=2024.6.1", "dask>=2024.8", "scipy>=1.11", "pandas>=2.1"),
        *("datasets>=3.0", "filelock>=3.12", "psutil>=5.9", "tqdm>=4.66"),
    ],
    # segmentation and shape of cells, distances between sets of cells, tests
    "metrics": ["scipy>=1.11", "scikit-image>=0.22", "scikit-learn>=1.5", "trimesh>=4.5", "PyWavelets>=1.5"],
    # Med3D features, the paper's FID
    "med3d": ["monai>=1.4", "transformers>=5.0"],
    # pictures of volumes, charts, 3D models
    "viz": ["matplotlib>=3.8", "scipy>=1.11", "scikit-image>=0.22", "trimesh>=4.5"],
    # films of cells as MP4 (GIF needs no more than viz)
    "film": ["imageio[ffmpeg]>=2.34", "matplotlib>=3.8"],
    # diffusers' DPMSolverSDEScheduler
    "sde": ["torchsde>=0.2.6"],
    # LoRA fine-tuning on few cells
    "lora": ["peft>=0.15"],
    # volumes to and from OME-Zarr
    "zarr": ["ome-zarr>=0.10", "zarr>=2.18", "dask>=2024.8"],
    # volumes to and from NIfTI, from Imaris
    "nifti": ["nibabel>=5.2"],
    "imaris": ["h5py>=3.10"],
    # byoc-prepare on the workers of a cluster
    "dask": ["dask>=2024.8", "distributed>=2024.8"],
}
# metrics and viz for the report at its end
extras["train"] = ["tensorboard>=2.15", *extras["data"], *extras["metrics"], *extras["viz"]]
# byoc-app
extras["app"] = ["gradio>=6.0", *extras["data"], *extras["metrics"], *extras["viz"]]
extras["all"] = sorted({requirement for requirements in extras.values() for requirement in requirements})
# Microscopes' own formats. Not in "all": bioio-czi is under the GPL, and so is what bioio-lif before 2.0 brings.
free_readers = ["bioio>=3.0", "bioio-nd2>=1.0"]
extras["bioio"] = [*free_readers, "bioio-czi>=2.0", "bioio-lif>=1.4"]
checks = [
    "build>=1.2",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "torchmetrics>=1.5",
    "wandb>=0.18",
]
others_readers = ["bioio-ome-tiff>=1.1", "bioio-ome-zarr>=1.2", "bioio-tifffile>=1.3"]  # of what is written here
extras["test"] = [*checks, *free_readers, *others_readers, *extras["all"]]
# what this package is timed against (docs/performance.md), and what MedicalDiffusion's own code imports
extras["benchmarks"] = [
    "monai>=1.4",
    "vector-quantize-pytorch>=1.20",
    "einops>=0.8",
    "einops-exts>=0.0.4",
    "rotary-embedding-torch>=0.8",
    *extras["train"],
]
# the site
extras["docs"] = ["mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"]
# playwright: with a Chromium of one's own, for the page's slow tests
extras["dev"] = ["ruff>=0.9", "playwright>=1.50", *extras["docs"], *extras["test"]]
# for some only, hence not in "all": Weights & Biases, 8-bit optimizers, sharding over many GPUs, MedicalDiffusion's
# perceptual loss
extras["wandb"] = ["wandb>=0.18"]
extras["8bit"] = ["bitsandbytes>=0.45"]  # on a CPU 0.50
extras["deepspeed"] = ["deepspeed>=0.19"]
extras["perceptual"] = ["lpips>=0.1.4"]

setup(
    name="diffusers_byoc",
    version=re.search(r'^__version__ = "(.+)"$', package.read_text(encoding="utf-8"), re.M)[1],
    description="Generate two-channel 3D microscopy volumes of single cells with diffusers",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="The diffusers_byoc authors",
    license="Apache-2.0",
    keywords="diffusion, microscopy, light-sheet, single cell, 3D, VQ-VAE, diffusers",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "diffusers_byoc": ["commands/presets/*.json", "commands/presets/*/*.json", "publishing/template.md"],
    },
    entry_points={
        "console_scripts": [
            "byoc-app = diffusers_byoc.commands.app:main",
            "byoc-evaluate = diffusers_byoc.commands.evaluate:main",
            "byoc-generate = diffusers_byoc.commands.generate:main",
            "byoc-prepare = diffusers_byoc.commands.prepare:main",
            "byoc-publish = diffusers_byoc.commands.publish:main",
            "byoc-reproduce = diffusers_byoc.commands.reproduce:main",
            "byoc-train = diffusers_byoc.commands.train:main",
            "byoc-train-baseline = diffusers_byoc.commands.train_baseline:main",
        ]
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.41,<0.43",  # 0.41 is the last release for Python 3.10
        "accelerate>=1.1",
        "huggingface-hub>=1.32",
        "safetensors>=0.8",
        "numpy>=1.26",
    ],
    extras_require=extras,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Bio-Informatics",
    ],
)
