"""The package's docstrings as Markdown: roles become code, tables stay as they are typed."""

import re

import griffe


def as_markdown(text: str) -> str:
    text = re.sub(r':\w+:`~?\.*([\w.]+)`', lambda role: f"`{role[1].split('.')[-1]}`", text)
    text = re.sub(r'`([^`<>]+?)\s+<(https?://[^>]+)>`_', r'[\1](\2)', text)
    text = text.replace('G*I', 'G·I')  # no emphasis
    lines, table = [], []
    for line in text.splitlines():
        ruler = re.fullmatch(r'\s*=+( +=+)+', line) is not None
        if table or ruler:
            table.append(line)
            if sum(set(row.strip()) <= {'=', ' '} for row in table) == 3:
                lines += ['```text', *table, '```']
                table = []
        else:
            lines.append(line)
    return '\n'.join([*lines, *table])


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
