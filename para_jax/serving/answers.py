"""The output of a job: lines of OpenAI's batch format. A `custom_id` says what is answered already; the line's `id` and
its `created` say under which settings and on which day."""

from __future__ import annotations

import calendar
from datetime import UTC, date, datetime
from pathlib import Path

from ..config import BASE
from ..io.journal import Journal
from ..io.storage.bucket import Place
from .job_lines import Line
from .request import Completion

HEAD = '{"id": "batch_req_'


class Answers(Journal):
    """An open output."""

    def __init__(self, file: Place):
        """Opens or creates the file. Raises ValueError, and does not change it, if another process is writing it or if
        it holds anything but answers."""
        self.keys: dict[str, str] = {}
        """by custom_id: the keys of the lines that are answered without an error"""
        self.created = calendar.timegm(date.today().timetuple())
        """the day on which the job began, in seconds; all answers have it, so that none depends on when it came"""
        super().__init__(file, HEAD, self._keep)

    @property
    def day(self) -> str:
        return datetime.fromtimestamp(self.created, UTC).date().isoformat()

    def _keep(self, row: dict) -> None:
        if row["error"] is None:
            self.created = row["response"]["body"]["created"]
            self.keys[row["custom_id"]] = row["response"]["request_id"]
        elif "custom_id" not in row:
            raise KeyError("custom_id")

    def close(self) -> None:
        """As any journal's; a file without an answer goes."""
        super().close()
        if isinstance(self.file, Path) and self.regular and self.file.exists() and not self.file.stat().st_size:
            self.file.unlink()

    def put(self, line: Line, samples: list[Completion], error: str | None) -> None:
        """Adds the answer to a line: its samples, or its error."""
        body = None if error else self._body(line, samples)
        response = {"status_code": 400 if error else 200, "request_id": line.key, "body": body}
        why = {"code": "request_failed", "message": error} if error else None
        row = {"id": f"batch_req_{line.key}", "custom_id": line.custom_id, "response": response, "error": why}
        self.add(row)

    def _body(self, line: Line, samples: list[Completion]) -> dict:
        """The samples as the body of the server's answer."""
        assert line.request is not None
        choices = []
        for one in sorted(samples, key=lambda one: one.index):
            text = {"message": {"role": "assistant", "content": one.text}} if line.chat else {"text": one.text}
            choices.append({"index": one.index, **text, "logprobs": None, "finish_reason": one.finish_reason})
        prompt, new = samples[0].prompt_tokens, sum(len(one.tokens) for one in samples)
        return {
            "id": f"{'chatcmpl' if line.chat else 'cmpl'}-{line.key}",
            "object": "chat.completion" if line.chat else "text_completion",
            "created": self.created,
            "model": line.request.tenant or BASE,
            "choices": choices,
            "usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new},
        }
