"""Says in a line why the object store cannot be used. What the store or its client says is never shown as it is."""

from __future__ import annotations

import re

from patchforge.service.errors import ResultsRefused, ResultsUnavailable

METADATA_ADDRESSES = ("169.254.169.254", "169.254.170.2", "fd00:ec2::254")
"""Where the client asks for the credentials of a machine's or container's role, if it was given none."""

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,64})</Code>")

REFUSALS = {
    "AuthorizationHeaderMalformed": "it is in another region: set AWS_REGION",
    "ExpiredToken": "the session token has expired",
    "IllegalLocationConstraintException": "it is in another region: set AWS_REGION",
    "InvalidAccessKeyId": "it does not know the access key: check AWS_ACCESS_KEY_ID",
    "InvalidBucketName": "the bucket's name is not valid",
    "InvalidToken": "the session token is not valid: check AWS_SESSION_TOKEN",
    "NoSuchBucket": "there is no such bucket",
    "PermanentRedirect": "it is in another region, or at another address: set AWS_REGION or AWS_ENDPOINT_URL",
    "RequestTimeTooSkewed": "its clock and this machine's differ too much",
    "SignatureDoesNotMatch": "it does not accept the signature: check AWS_SECRET_ACCESS_KEY",
}
"""What S3's error codes mean. https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html"""


def is_missing(error: Exception) -> bool:
    """Tells whether the object does not exist. A bucket that does not exist is another matter."""
    return isinstance(error, FileNotFoundError) and _code_of(str(error)) in ("", "NoSuchKey")


def reason_of(error: Exception, place: str, operation: str) -> ResultsUnavailable:
    """Returns the error for callers: `ResultsRefused` if only an operator can help, as with a wrong key or bucket."""
    text = str(error)
    status, code = _STATUS.search(text), _code_of(text)
    if any(address in text for address in METADATA_ADDRESSES):
        reason = (
            "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role"
        )
    elif code in REFUSALS:
        reason = REFUSALS[code]
    elif status is None:
        return _away(text, place)
    elif status[1] in ("301", "307", "308"):
        reason = REFUSALS["PermanentRedirect"]
    elif status[1] in ("401", "403"):
        reason = f"these credentials may not {operation} there"
    elif status[1][0] == "4" and status[1] not in ("408", "429"):
        reason = f"it answers {status[1]} {code}".rstrip()
    else:
        return ResultsUnavailable(f"the object store {place} cannot be used: it answers {status[1]} {code}".rstrip())
    return ResultsRefused(f"the object store {place} cannot be used: {reason}")


def _away(text: str, place: str) -> ResultsUnavailable:
    if "InvalidCertificate" in text:
        reason = "its certificate is not trusted: name its CA in PATCHFORGE_RESULTS_TLS_CA"
        return ResultsRefused(f"the object store {place} cannot be used: {reason}")
    if "timed out" in text or "TimedOut" in text or "kind: Timeout" in text:
        return ResultsUnavailable(f"the object store {place} does not answer")
    return ResultsUnavailable(f"the object store {place} cannot be reached")


def _code_of(text: str) -> str:
    found = _CODE.search(text)
    return found[1] if found else ""
