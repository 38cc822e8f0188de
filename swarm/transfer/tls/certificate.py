"""The certificate of one node's bulk connections: made at the start, known by its fingerprint, with nothing in it.

No authority signs it and no name stands in it: whoever connects learns from it neither who we are nor whom to ask.
The key never touches a disk.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

# Nobody checks them: what counts is the fingerprint, and clocks may be wrong.
_FROM, _UNTIL = datetime(2000, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)


class Certificate:
    """A fresh key pair and its self-signed certificate, ready to serve."""

    def __init__(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _self_signed(key)
        self.fingerprint = fingerprint_of(certificate.public_bytes(Encoding.DER))
        self.context = _server_context(
            certificate.public_bytes(Encoding.PEM),
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        )


def fingerprint_of(certificate: bytes) -> bytes:
    """SHA-256 of a certificate in DER form."""
    return hashlib.sha256(certificate).digest()


@cache
def client_context() -> ssl.SSLContext:
    """For connections whose certificate the caller compares with the fingerprint it knows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _server_context(certificate: bytes, key: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nothing is resumed: every connection has a token of its own
    with ExitStack() as stack:  # the ssl module reads files only; these are pipes
        context.load_cert_chain(_readable(certificate, stack), _readable(key, stack))
    return context


def _readable(data: bytes, stack: ExitStack) -> str:
    """A path at which `data` can be read, once."""
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    try:
        written = os.write(writer, data)  # a few hundred bytes: less than any pipe holds
    finally:
        os.close(writer)
    assert written == len(data)
    return f"/dev/fd/{reader}"


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    nobody = x509.Name([])
    return (
        x509.CertificateBuilder()
        .subject_name(nobody)
        .issuer_name(nobody)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .sign(key, hashes.SHA256())
    )
