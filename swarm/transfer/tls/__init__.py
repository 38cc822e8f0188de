"""Bytes over TLS 1.3 connections of their own, bound to peer ids by a certificate and a token. Import from the modules.

The offer (`protocol.messages.BulkOffer`) comes over an authenticated stream: where to connect, which certificate to
find there, and a token to show. The client checks the certificate before it sends anything, the server says nothing
before it has seen the token.
"""
