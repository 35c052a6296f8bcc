"""Laws of URLs: what names the file is told from its query, and what is secret is in no message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError, UsageError
from data.urls import has_suffix, join, split_query, without_secrets

NAMES = st.text("abcXYZ019-_. /%&[]{}*", min_size=1, max_size=20).filter(lambda name: not name.isspace())
SECRETS = st.text("abcXYZ019-_.~%&=/+:;,", max_size=20).map(lambda text: f"sig={text}ature")
WEB = st.sampled_from(["http://h", "https://h.org:8443/deep/folder", "HTTP://h"])
ELSEWHERE = st.sampled_from(["", "/data", "s3://bucket", "memory://a", "file:///data"])


@given(WEB, NAMES, SECRETS)
def test_a_web_address_is_split_into_what_names_the_file_and_its_query(web, name, secret):
    assert split_query(f"{web}/{name}?{secret}") == (f"{web}/{name}", f"?{secret}")
    assert has_suffix(f"{web}/{name}.TAR?{secret}.zip", ".tar", ".csv")
    assert not has_suffix(f"{web}/{name}.zip?{secret}.tar", ".tar", ".csv")
    assert join(f"{web}/?{secret}", "a.tar") == join(f"{web}?{secret}", "a.tar") == f"{web}/a.tar?{secret}"
    assert join(f"{web}?{secret}", "a.tar?own") == f"{web}/a.tar?own"


@given(ELSEWHERE, NAMES)
def test_elsewhere_a_question_mark_and_a_hash_are_parts_of_the_name(place, name):
    assert split_query(f"{place}/{name}?#.tar") == (f"{place}/{name}?#.tar", "")
    assert has_suffix(f"{place}/{name}?.tar", ".tar") and not has_suffix(f"{place}/a.tar?{name}0", ".tar")
    assert join(f"{place}/a?b/", "c.tar") == f"{place}/a?b/c.tar"


@given(WEB, SECRETS, st.sampled_from(["{}", "{} does not exist", "{}: bytes 0 to 1", "url='{}')", "({}), {}; twice"]))
@pytest.mark.parametrize("kind", [DataError, UsageError])
def test_no_error_has_the_query_or_the_credentials_of_a_url_and_all_say_the_rest(kind, web, secret, message):
    scheme, _, host = web.partition("://")
    said = str(kind(message.format(*[f"{scheme}://me:{secret.replace('/', '')}@{host}/a.tar?{secret}"] * 2)))
    assert said == message.format(*[f"{scheme}://{host}/a.tar?..."] * 2)
    assert without_secrets(said) == said


@given(ELSEWHERE, NAMES)
def test_messages_of_other_places_stay_as_they_are(place, name):
    assert str(DataError(f"{place}/{name}?x=1: is damaged")) == f"{place}/{name}?x=1: is damaged"
