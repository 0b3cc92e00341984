"""Errors as clients see them: `{"error": {"message", "type", "param", "code"}}`."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

CLIENT_CLOSED_REQUEST = 499  # for the log: nobody is there to read it


class ApiError(Exception):
    """
    An answer other than success.

    Args:
        status (`int`): HTTP status.
        message (`str`): For people: what is wrong, and what to do. Never a path or a traceback.
        code (`str`): For programs.
        param (`str`, *optional*): The field at fault.
        retry_after (`int`, *optional*): Seconds after which to try again.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def type(self) -> str:
        """The class of errors, by the status."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status in (408, 413):
            headers["Connection"] = "close"  # the rest of the body is not read
        content = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        response = JSONResponse({"error": content}, self.status, headers)
        if self.status == 401:
            # a browser asks its user for the first of these: any user name, and the token as the password
            response.headers.append("WWW-Authenticate", 'Basic realm="cogview2", charset="UTF-8"')
            response.headers.append("WWW-Authenticate", "Bearer")
        return response


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A mistake in the request."""
    return ApiError(400, message, code, param)


def internal_error() -> ApiError:
    """A mistake of ours; the log has the details under the request's id."""
    return ApiError(500, "The server failed. Its log has the details under the X-Request-Id of this answer.", "failed")


def answer_errors(app: Starlette) -> None:
    """Have an application answer what is raised in it, and paths that it does not have."""
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(HTTPException, _answer_http)


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: ("There is no such path.", "not_found"), 405: ("This path has other methods.", "method_not_allowed")}
    message, code = known.get(error.status_code, ("The request cannot be answered.", "invalid_request"))
    response = ApiError(error.status_code, message, code).response()
    response.headers.update(error.headers or {})
    return response
