"""What a completion may say where a scorer evaluates it: numbers, names, operators and functions of
mathematics.

The process is sealed off whatever the text does (lockdown.py). This guard keeps a text from
choosing its own reward, by reaching into the scorer through attributes, built-in functions or code
in a string: for those expressions that sympy's parse_expr and the scorers below evaluate, it is
refused as malformed before it runs.
"""

from __future__ import annotations

import ast
import sys
from typing import Any

# Scorers of reasoning-gym that call eval on a list that the completion writes; a literal is all
# they can use.
_EVAL_OF_A_LITERAL = (
    "reasoning_gym.algorithmic.binary_matrix",
    "reasoning_gym.algorithmic.spiral_matrix",
    "reasoning_gym.algorithmic.string_insertion",
    "reasoning_gym.games.n_queens",
)
_SHAPES = (
    ast.Expression,
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.Call,
    ast.keyword,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.Tuple,
    ast.List,
    ast.Set,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
)
_FROM_TEXT = ("Symbol", "Function", "Integer", "Float", "Rational")
# Functions (not classes) of sympy, and built-in ones, that stay within mathematics.
_FUNCTIONS = frozenset(
    "sqrt cbrt root real_root abs round min max pow sum divmod simplify expand factor cancel together apart trigsimp "
    "gcd lcm binomial diff integrate limit summation product log ln exp degree Rational".split()
)


def guard_evaluation() -> None:
    """Put the guard between the scorers of this process and `eval`."""
    for name in _EVAL_OF_A_LITERAL:
        if (module := sys.modules.get(name)) is not None:
            vars(module)["eval"] = _literal
    parser = sys.modules.get("sympy.parsing.sympy_parser")
    if parser is not None and hasattr(parser, "stringify_expr"):
        plain = parser.stringify_expr

        def stringify_expr(text: str, local_dict: Any, global_dict: Any, transformations: Any) -> str:
            code = plain(text, local_dict, global_dict, transformations)
            refuse_more_than_mathematics(code, local_dict or {}, global_dict or {})
            return code

        vars(parser)["stringify_expr"] = stringify_expr  # the last step before parse_expr evaluates


def _literal(text: str) -> Any:
    return ast.literal_eval(text.strip())


def refuse_more_than_mathematics(code: str, local_names: dict[str, Any], global_names: dict[str, Any]) -> None:
    """Raises ValueError unless `code`, as sympy's parser is about to evaluate it, is an expression
    of mathematics alone.
    """
    tree = ast.parse(code.strip(), mode="eval")
    texts = 0
    for node in ast.walk(tree):
        if not isinstance(node, _SHAPES):
            raise ValueError(f"{type(node).__name__} is no part of a mathematical expression")
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            texts += 1
        if isinstance(node, ast.Call):
            texts -= _names_made_from_text(node)
            _refuse_other_functions(node.func, local_names, global_names)
    if texts:
        raise ValueError("a text is no part of a mathematical expression")


def _names_made_from_text(node: ast.Call) -> int:
    """1 for `Symbol('x')` and its like, which sympy's parser makes of a bare name or number."""
    made = isinstance(node.func, ast.Name) and node.func.id in _FROM_TEXT
    return int(
        made and bool(node.args) and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    )


def _refuse_other_functions(function: ast.expr, local_names: dict[str, Any], global_names: dict[str, Any]) -> None:
    if isinstance(function, ast.Call):  # Function('f')(x)
        return
    if not isinstance(function, ast.Name):
        raise ValueError(f"{type(function).__name__} is no function of mathematics")
    if function.id in local_names or function.id in _FUNCTIONS:
        return
    basic = getattr(sys.modules.get("sympy"), "Basic", None)
    found = global_names.get(function.id)
    if not (isinstance(found, type) and isinstance(basic, type) and issubclass(found, basic)):
        raise ValueError(f"{function.id} is no function of mathematics")
