"""The answers to the exercises, which stand folded in the text of the script: each is run here."""

import ast
import re
from pathlib import Path

import pytest

import convolutional_neural_networks as tutorial

TEXT = Path(tutorial.__file__).read_text(encoding="utf-8")
SECTION = re.compile(r"^## (\d) .*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
EXERCISES = re.compile(r"^\*\*Exercises (\d)\.\*\*(.*?)"
                       r"^<details><summary>Answers</summary>\n(.*?)^</details>$", re.MULTILINE | re.DOTALL)
ANSWER = re.compile(r"^([a-z])\) (.*?)(?=^[a-z]\) |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read_exercises():
    """Return {section: (letters of the questions, {letter: [code blocks of the answer]})}."""
    exercises = {}
    for section in SECTION.finditer(TEXT):
        for number, questions, answers in EXERCISES.findall(section.group(0)):
            assert number == section.group(1), f"exercises {number} stand in section {section.group(1)}"
            assert number not in exercises, f"section {number} has exercises twice"
            letters = re.findall(r"(?:^|\s)([a-z])\)\s", questions)
            blocks = {letter: BLOCK.findall(answer) for letter, answer in ANSWER.findall(answers)}
            exercises[number] = letters, blocks
    return exercises


READ = read_exercises()
BLOCKS = [(section + letter, number, code) for section, (_, answers) in READ.items()
          for letter, blocks in answers.items() for number, code in enumerate(blocks)]


def test_each_section_has_exercises():
    assert list(READ) == list("012345678")
    assert TEXT.count("```python\n") == len(BLOCKS), "a block of code stands outside of the answers"


@pytest.mark.parametrize("section", READ)
def test_each_question_has_an_answer_that_proves_itself(section):
    questions, answers = READ[section]
    assert questions == list("abcdefgh"[:len(questions)]) and len(questions) >= 2
    assert list(answers) == questions
    for letter, blocks in answers.items():
        asserts = [node for code in blocks for node in ast.walk(ast.parse(code))
                   if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant)]
        assert asserts, f"answer {section}{letter} shows nothing"


@pytest.mark.parametrize(("name", "number", "code"), BLOCKS,
                         ids=[name + (f"-{number}" if number else "") for name, number, _ in BLOCKS])
def test_the_answer_is_right(name, number, code, digits):
    """What stands above is known: the script's names, and the bundled digits."""
    names = vars(tutorial) | {"digits": digits}
    earlier = [block for other, place, block in BLOCKS if other == name and place < number]
    for block in [*earlier, code]:
        exec(compile(block, f"<answer {name}>", "exec"), names)
