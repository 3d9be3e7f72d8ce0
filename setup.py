"""Packaging of helpsteer_assets. Ranges stand here, the versions that were tried in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

POSTGRES = ["dagster-postgres>=0.29.27,<0.30", "psycopg2-binary>=2.9.13"]

setup(
    name="helpsteer_assets",
    version="0.1.0",
    description="MODPO on nvidia/HelpSteer as Dagster software-defined assets",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["helpsteer_assets", "helpsteer_assets.*"]),
    package_data={"helpsteer_assets": ["experiments/*.yaml", "assets/*.jinja", "embedded/model/*", "report/*"]},
    entry_points={"console_scripts": ["helpsteer = helpsteer_assets.cli:entry"]},
    install_requires=[
        "dagster>=1.13.27,<1.14",
        "dagster-webserver>=1.13.27,<1.14",
        "torch>=2.9",
        "transformers>=5.17,<6",
        "datasets>=5,<6",
        "peft>=0.21,<1",
        "trl>=1.16,<2",
        "duckdb>=2,<3",
        "accelerate>=1.15,<2",
        "click>=8.1",
        "filelock>=3.30",
        "huggingface_hub>=2,<3",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=2",
        "pillow>=11",
        "pyarrow>=20",
        "pydantic>=2.10,<3",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "tqdm>=4.66",
    ],
    extras_require={
        "smollm2": ["gguf>=0.17"],
        "vllm": ["vllm>=0.11"],
        "postgres": POSTGRES,
        "ray": [*POSTGRES, "dagster-ray>=0.4.8,<0.5", "ray[default]>=2.60,<3"],
        "dev": [
            "dagster-dg-cli>=1.13.27,<1.14",
            "hypothesis>=6.100",
            "moocore>=0.3",
            "mypy>=2",
            "playwright>=1.55",
            "pre-commit>=4",
            "pytest>=9",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            "scipy>=1.15",
            "types-PyYAML>=6",
        ],
    },
)
