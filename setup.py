"""Packaging. Tool settings are in pyproject.toml, exact versions in requirements.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megadyn",
    version="0.1.0",
    description="Pretraining of routed transformers under tensor and pipeline parallelism",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megadyn", "megadyn.*"]),
    package_data={"megadyn.report": ["page.css", "page.js"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed==0.19.8",
        "transformers>=5,<6",
        "tokenizers",
        "sentencepiece",
        "safetensors",
        "numpy",
        "pyarrow",
        "mpi4py",
        "omegaconf>=2.3",
        "orjson",
        "tqdm",
        "rich>=13",
        "tensorboard",
    ],
    extras_require={
        "flash": ["flash-attn>=2.6"],
        "fast": ["gigatoken>=0.10,<0.11"],
        "eval": ["lm_eval>=0.4.11,<0.5"],
        "wandb": ["wandb>=0.31,<1"],
        "kernels": ["triton>=3.6,<3.8"],
    },
)
