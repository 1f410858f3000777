"Package metadata, read from settings.ini so that nbdev and pip share one source."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    url=cfg["git_url"],
    license="Apache-2.0",
    packages=find_packages(include=["guidance_nb", "guidance_nb.*"]),
    package_data={
        "guidance_nb": ["py.typed", "*.pyi", "models/*/*"],
        "guidance_nb.explorer": ["*.js", "*.json", "*.css", "*.html", "*.png", "*.wasm", "kernels.c"],
        "guidance_nb.cli": ["*.pyi", "*.html", "recipe_files/*.toml", "recipe_files/*/*.toml"],
        "guidance_nb.engine": ["*.pyi", "launch_files/*.yaml"],
        "guidance_nb.images": ["*.pyi"],
        "guidance_nb.interop": ["*.pyi", "cards/*.txt"],
    },
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in cfg["extras"].split()},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Source": cfg["git_url"],
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
        "Issues": f"{cfg['git_url']}/issues",
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": ["guidance_nb=guidance_nb._modidx:d"],
    },
)
