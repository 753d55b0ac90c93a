"""The demo models' training text: the documentation that comes with the Python that runs this.

Docstrings are read out of the standard library's source with `ast` (nothing is imported for them), the docstrings of types and
functions written in C are asked of a fixed list of modules, and the language reference comes from `pydoc_data.topics`. All of it is
under the PSF licence. The result depends on the Python version and on nothing else.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import random
import re
import sysconfig
import textwrap
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data import topics
from typing import Literal

Kind = Literal["function", "class", "module", "topic", "section"]

# Packages whose docstrings are test code, generated tables or one long repetition.
SKIPPED = frozenset([
    "site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "ensurepip", "pydoc_data", "tkinter", "turtledemo",
    "distutils", "lib-dynload", "config", "turtle.py", "__phello__", "antigravity.py", "this.py", "ctypes", "msilib", "curses",
    "xmlrpc", "wsgiref",
])  # fmt: skip
# Where a documented name is known by another: the user writes os.path.join, the file is posixpath.py.
RENAMED = {"posixpath": "os.path", "genericpath": "os.path", "asyncio": "asyncio", "concurrent.futures": "concurrent.futures"}
NATIVE_MODULES = (
    "builtins", "array", "atexit", "binascii", "bisect", "cmath", "collections", "csv", "datetime", "decimal", "functools", "gc",
    "hashlib", "heapq", "io", "itertools", "json", "math", "mmap", "operator", "os", "pickle", "queue", "random", "re", "select",
    "signal", "socket", "sqlite3", "struct", "sys", "threading", "time", "unicodedata", "weakref", "zlib",
)  # fmt: skip
# Modules that everyone meets: never held out, and the text that many chats are made of.
CORE_MODULES = frozenset([
    "builtins", "os", "os.path", "sys", "math", "random", "json", "re", "itertools", "functools", "collections", "time", "datetime",
    "pathlib", "shutil", "subprocess", "string", "textwrap", "statistics", "heapq", "bisect", "threading", "asyncio", "csv",
    "logging", "hashlib", "tempfile", "glob", "copy", "contextlib", "dataclasses", "enum", "io", "queue", "urllib.parse", "operator",
    "fnmatch", "pprint", "calendar",
])  # fmt: skip
# What people ask a demo about first. A model this small recites only what it has seen a hundred times, so these few are.
FAMOUS_MODULES = frozenset(["builtins", "os.path", "math", "random", "json", "re", "itertools", "functools", "collections", "copy", "glob"])
FAMOUS_CLASSES = frozenset(["str", "list", "dict", "set", "tuple", "int", "float", "collections.deque", "collections.Counter"])
FAMOUS_NAMES = frozenset([
    "os", "sys", "time", "datetime", "pathlib", "logging", "threading", "asyncio", "string", "statistics", "contextlib", "heapq", "bisect",
    "os.listdir", "os.mkdir", "os.makedirs", "os.remove", "os.rename", "os.getcwd", "os.chdir", "os.walk", "os.getpid", "os.stat",
    "subprocess", "subprocess.run", "asyncio.gather", "asyncio.run", "asyncio.sleep", "datetime.datetime.now", "tempfile", "textwrap",
    "textwrap.wrap", "textwrap.dedent", "tempfile.mkdtemp", "statistics.mean", "statistics.median", "contextlib.contextmanager",
    "dataclasses.dataclass", "sys.exit", "threading.Thread", "queue.Queue", "pprint.pprint", "operator.itemgetter", "time.time",
    "time.sleep", "time.strftime", "time.localtime", "time.perf_counter", "time.monotonic", "shutil", "shutil.copy", "shutil.copytree",
    "shutil.move", "shutil.rmtree", "shutil.which", "heapq.heappush", "heapq.heappop", "heapq.heapify", "bisect.bisect_left",
    "pathlib.Path", "pathlib.Path.exists", "pathlib.Path.glob", "pathlib.Path.mkdir", "pathlib.Path.read_text", "pathlib.Path.resolve",
])  # fmt: skip
FAMOUS_TOPICS = frozenset([
    "Lambdas", "Comparisons", "Boolean operations", "Lists", "Tuples", "Dictionaries", "Modules", "Exceptions", "Operator precedence",
    "Function definitions", "Class definitions", "Slicings", "Calls", "Truth Value Testing", "Ranges", "Generator functions",
])  # fmt: skip
FAMOUS_REPEATS = 60  # chats a pass
MAX_CHARS = 800  # of one training document; about 250 tokens
MAX_ANSWER_CHARS = 320  # of one chat answer, cut at a paragraph
HELD_OUT_BYTES = 20_000
HELD_OUT_SEPARATOR = "\n\f\n"
ENTRY = re.compile(r"^[\w.]+\([^\n]*\)$", re.MULTILINE)
HEADING = re.compile(r"^([^\n]+)\n(\*{3,}|={3,}|-{3,}|~{3,})$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One documented name: `text` is the docstring, or a section of the language reference."""

    name: str  # as a user writes it: os.path.join, or the heading of a section
    kind: Kind
    signature: str  # "(a, *p)", or empty where there is none
    text: str
    is_core: bool

    @property
    def is_famous(self) -> bool:
        """Whether a chat about it must come out right."""
        if not self.is_core or self.name.split(".")[-1].endswith(("Error", "Warning", "Exit")):
            return False
        if self.kind in ("topic", "section"):
            return self.name in FAMOUS_TOPICS or (self.name.startswith("The ") and self.name.endswith(" statement"))
        parent = self.name.rpartition(".")[0] or ("" if self.kind == "module" else "builtins")
        return self.name in FAMOUS_MODULES | FAMOUS_CLASSES | FAMOUS_NAMES or parent in FAMOUS_MODULES | FAMOUS_CLASSES

    def raw(self) -> str:
        """The form for completion: source for a function or class, the bare text for everything else."""
        if self.kind == "function":
            head = f"def {self.name.rpartition('.')[2]}{self.signature or '(...)'}:"
        elif self.kind == "class":
            head = f"class {self.name.rpartition('.')[2]}:"
        else:
            return self.text
        body = textwrap.indent(self.text, "    ").lstrip()
        return f'{head}\n    """{body}\n    """' if "\n" in body else f'{head}\n    """{body}"""'

    def answer(self) -> str:
        """The form for chat: the name with its signature, then the docstring up to a whole paragraph."""
        body = shorten(self.text, MAX_ANSWER_CHARS)
        if self.kind in ("function", "class"):
            return f"`{'class ' if self.kind == 'class' else ''}{self.name}{self.signature}`\n\n{body}"
        return body


def shorten(text: str, max_chars: int) -> str:
    """Whole paragraphs of `text` up to `max_chars`; at least the first, cut at a line if it alone is too long."""
    kept = ""
    for paragraph in text.split("\n\n"):
        if kept and len(kept) + len(paragraph) + 2 > max_chars:
            break
        kept = f"{kept}\n\n{paragraph}" if kept else paragraph
    if len(kept) > max_chars:
        kept = kept[:max_chars].rpartition("\n")[0] or kept[:max_chars].rpartition(" ")[0]
    return kept.rstrip(" \n:")


def split(text: str, max_chars: int = MAX_CHARS) -> list[str]:
    """`text` in pieces of whole paragraphs, each of at most `max_chars` unless one paragraph is longer."""
    pieces: list[str] = []
    for paragraph in text.split("\n\n"):
        if pieces and len(pieces[-1]) + len(paragraph) + 2 <= max_chars:
            pieces[-1] += f"\n\n{paragraph}"
        else:
            pieces.append(paragraph)
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def collect() -> list[Document]:
    """Every document, in a fixed order: each core name, and each other text that no document before it has."""
    found = [*_from_source(), *_from_native(), *_from_topics()]
    found.sort(key=lambda d: (not d.is_core, d.name, d.kind, d.text))
    kept: list[Document] = []
    texts: set[str] = set()
    names: set[str] = set()
    for document in found:
        key = _normalized(document.text)
        if (key in texts and not document.is_core) or document.name in names:
            continue
        kept.append(document)
        texts.add(key)
        names.add(document.name)
    return kept


def hold_out(documents: list[Document], max_bytes: int = HELD_OUT_BYTES) -> tuple[list[Document], list[str]]:
    """Split into training documents and held-out raw texts: by a hash of the text, and never one that training nearly contains.

    A candidate is dropped from the held-out side if a fifth of its five-word runs also occur in a training document.
    """
    candidates = [d for d in documents if not d.is_core and d.kind in ("function", "class", "module") and _may_be_held_out(d)]
    chosen = {d.text for d in candidates}
    seen = {run for d in documents if d.text not in chosen for run in _runs(d.text)}
    held: list[str] = []
    held_texts: set[str] = set()
    size = 0
    for document in sorted(candidates, key=lambda d: _digest(d.text)):
        runs = _runs(document.text)
        raw = document.raw()
        if size + len(raw.encode()) > max_bytes or sum(run in seen for run in runs) * 5 >= len(runs):
            continue
        held.append(raw)
        held_texts.add(document.text)
        seen.update(runs)
        size += len(raw.encode())
    released = [d for d in candidates if d.text not in held_texts]
    held_runs = {run for text in held_texts for run in _runs(text)}
    clash = {d.text for d in released if sum(run in held_runs for run in _runs(d.text)) * 5 >= len(_runs(d.text))}
    return [d for d in documents if d.text not in held_texts and d.text not in clash], held


def _may_be_held_out(document: Document) -> bool:
    return 100 <= len(document.text) <= MAX_CHARS and _digest(document.text) % 16 == 0


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(_normalized(text).encode()).digest()[:8], "big")


def _normalized(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _runs(text: str) -> list[str]:
    words = _normalized(text).split()
    return [" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))]


def _from_source() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in SKIPPED or (part.startswith(("_", "config-")) and part != "__init__.py") for part in parts):
            continue
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        renamed = next((new for old, new in RENAMED.items() if module == old or module.startswith(f"{old}.")), module)
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield from (replace(d, name=d.name.replace("random.Random.", "random.")) for d in _from_tree(tree, renamed))


def _from_tree(tree: ast.Module, module: str) -> Iterator[Document]:
    is_core = module in CORE_MODULES
    yield from _document(module, "module", "", ast.get_docstring(tree), is_core)
    for node in tree.body:
        yield from _from_node(node, module, is_core)


def _from_node(node: ast.stmt, prefix: str, is_core: bool) -> Iterator[Document]:
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
        return
    name = f"{prefix}.{node.name}"
    if isinstance(node, ast.ClassDef):
        yield from _document(name, "class", "", ast.get_docstring(node), is_core)
        for child in node.body:
            yield from _from_node(child, name, is_core)
    else:
        arguments = ast.unparse(node.args)
        yield from _document(name, "function", f"({arguments})", ast.get_docstring(node), is_core)


def _from_native() -> Iterator[Document]:
    for module_name in NATIVE_MODULES:
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else f"{module_name}."
        is_core = module_name in CORE_MODULES
        yield from _document(module_name, "module", "", module.__doc__, is_core)
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or name in ("copyright", "credits", "license", "exit", "quit"):
                continue
            if isinstance(value, types.BuiltinFunctionType):
                yield from _native(f"{prefix}{name}", "function", value, is_core)
            elif isinstance(value, type) and not hasattr(value, "__dataclass_fields__"):
                yield from _native_class(f"{prefix}{name}", value, is_core)


def _native_class(name: str, cls: type, is_core: bool) -> Iterator[Document]:
    if isinstance(vars(cls).get("__init__"), types.FunctionType) or "__dict__" in vars(cls):
        return  # written in Python: its source has been read
    yield from _native(name, "class", cls, is_core)
    for method, value in sorted(vars(cls).items()):
        if not method.startswith("_") and callable(getattr(cls, method, None)):
            yield from _native(f"{name}.{method}", "function", value, is_core)


def _native(name: str, kind: Kind, value: object, is_core: bool) -> Iterator[Document]:
    signature = getattr(value, "__text_signature__", None) or ""
    cleaned = re.sub(r"\$\w+(, /)?(, )?", "", signature).replace(", /", "").replace("(/)", "()")
    text = value.__doc__ if isinstance(value.__doc__, str) else None
    yield from _document(name, kind, cleaned, text, is_core)


def _from_topics() -> Iterator[Document]:
    for key in sorted(topics.topics):
        if key == "debugger":
            continue
        yield from _from_topic(topics.topics[key])


def _from_topic(topic: str) -> Iterator[Document]:
    """A document per headed section; the first is the topic itself."""
    marks = list(HEADING.finditer(topic))
    for index, mark in enumerate(marks):
        end = marks[index + 1].start() if index + 1 < len(marks) else len(topic)
        body = topic[mark.end() : end].strip("\n")
        name = mark.group(1).strip().replace('"', "")
        if len(body) > 40:
            yield Document(name=name, kind="section" if index else "topic", signature="", text=_unquoted(body), is_core=True)


def _unquoted(text: str) -> str:
    """The reference quotes code as "x"; backticks read better and cannot be confused with Python's own quotes."""
    return re.sub(r'"([^"\n]{1,60})"', r"`\1`", text)


def _document(name: str, kind: Kind, signature: str, text: str | None, is_core: bool) -> Iterator[Document]:
    if text is None:
        return
    cleaned = inspect.cleandoc(text).strip()
    first, _, rest = cleaned.partition("\n--\n\n")  # what an extension writes when the signature did not parse
    cleaned = (rest or first).strip()
    if len(cleaned) >= 20 and cleaned.isascii():
        yield Document(name=name, kind=kind, signature=_short(signature), text=cleaned, is_core=is_core)


def _short(signature: str) -> str:
    """`signature` on one line, with an ellipsis for the arguments past the first 60 characters."""
    line = " ".join(signature.split())
    return line if len(line) <= 80 else f"{line[:60].rpartition(',')[0]}, ...)"


def entries(documents: Iterable[Document]) -> list[str]:
    """Raw training texts: each document in pieces short enough to be seen whole."""
    return [piece for document in documents for piece in split(document.raw())]


PERSONA = (
    ("Hello", "Hello! Ask me about a function, a class, a module or a statement of Python."),
    ("Hi", "Hello! Ask me about a function, a class, a module or a statement of Python."),
    ("Who are you?", "I am a small demonstration model. I was trained on the documentation that comes with Python."),
    ("What can you do?", "I can describe the functions, classes, modules and statements of Python in the words of its documentation."),
    ("Thank you", "You are welcome. Ask me about another part of Python."),
    ("Write a story.", "I only know Python's documentation. Ask me what a function does, for example len or os.path.join."),
)
ASK_NAME = (
    "What does {0} do?", "Explain {0}", "Explain {0}.", "What is {0}?", "Describe {0}.", "How do I use {0}?", "Tell me about {0}.",
    "help({0})", "What does {0}() do?", "What does {0} do in Python?",
)  # fmt: skip
ASK_MODULE = ("What is the {0} module?", "What does the {0} module do?", "Describe the {0} module.", "Explain the {0} module.", "{0}")
ASK_TOPIC = (
    "Explain {0}.",
    "Describe {0}.",
    "Explain {0}",
    "Describe {0}",
    "Tell me about {0}.",
    "What does {0} do?",
    "How does {0} work?",
)
SYSTEM = ("You are a helpful assistant.", "You answer questions about Python.", "Be brief.")
Message = dict[str, str]


def conversations(documents: Iterable[Document], rng: random.Random) -> list[list[Message]]:
    """One pass of chats: the famous names many times, each time in other words; some with a system message or two turns."""
    turns = [(question, answer) for question, answer in PERSONA for _ in range(FAMOUS_REPEATS)]
    for document in documents:
        asks = ASK_MODULE if document.kind == "module" else ASK_TOPIC if document.kind in ("topic", "section") else ASK_NAME
        repeats = FAMOUS_REPEATS if document.is_famous else 1 if document.is_core and len(document.text) <= MAX_ANSWER_CHARS else 0
        turns += [(ask.format(_spoken(document)), document.answer()) for ask in rng.choices(asks, k=repeats)]
    rng.shuffle(turns)
    chats: list[list[Message]] = []
    while turns:
        chat = [{"role": "system", "content": rng.choice(SYSTEM)}] if rng.random() < 0.25 else []
        for _ in range(min(len(turns), 2 if rng.random() < 0.1 else 1)):
            question, answer = turns.pop()
            chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        chats.append(chat)
    return chats


def _spoken(document: Document) -> str:
    """A heading as it stands inside a sentence: "The for statement" is asked about as "the for statement"."""
    if document.kind in ("topic", "section") and document.name[1:2].islower():
        return document.name[0].lower() + document.name[1:]
    return document.name
