"""Declares what a route takes and gives, once: requests are read by it, and OpenAPI is derived from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from k2.api.services import Services, Workers
from k2.errors import Rejected

_DIGITS = 19  # of a number in a request; what has more fits no 64 bits


@dataclass(frozen=True)
class Parameter:
    """One parameter of the query string, or of the path where the path names it.

    `kind` is str or int; an int is a whole number, at least `least`.
    """

    name: str
    doc: str
    kind: type = str
    default: str | None = None
    needed: bool = False
    least: int = 0

    def read(self, text: str | None) -> str | int | None:
        """Return the value given, or the default; raises ValueError saying what is wrong with it."""
        if text is None:
            if self.needed:
                raise ValueError("must be given")
            return self.default
        if self.kind is str:
            return text
        digits = text.strip()
        if not (digits.isascii() and digits.removeprefix("-").isdecimal() and len(digits) <= _DIGITS):
            raise ValueError("must be a whole number")
        if int(digits) < self.least:
            raise ValueError(f"must be at least {self.least}")
        return int(digits)


@dataclass(frozen=True)
class Call:
    """One request, its parameters read, and what it is answered from."""

    request: Request
    services: Services
    workers: Workers
    values: dict[str, Any]


Handler = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """A path, what it takes, who answers. The handler's docstring is its description.

    `model` names what a JSON answer looks like (`models.py`), `body` what must be sent; `rows`: other formats are
    offered too, and problems can come back.
    """

    path: str
    handler: Handler
    summary: str
    tag: str
    parameters: Sequence[Parameter] = ()
    method: str = "GET"
    model: str = ""
    body: str = ""
    rows: bool = False
    may_fail: bool = True

    def route(self) -> Route:
        """Return it as the application's router wants it."""

        async def answer(request: Request) -> Response:
            request.scope["k2_route"] = self.path  # the pattern: what the request is counted under
            state = request.app.state
            return await self.handler(Call(request, state.services, state.workers, self._read(request)))

        return Route(self.path, answer, methods=[self.method])

    def _read(self, request: Request) -> dict[str, Any]:
        given = {**request.query_params, **request.path_params}
        values, wrong = {}, []
        for parameter in self.parameters:
            try:
                values[parameter.name] = parameter.read(given.get(parameter.name))
            except ValueError as error:
                wrong.append(f"{parameter.name}: {error}")
        if wrong:
            raise Rejected(f"the request is not understood: {'; '.join(wrong)}")
        return values
