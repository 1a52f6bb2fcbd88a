//! Web pages of other origins are turned away.
//!
//! An operator's browser may hold an operator's certificate, or reach a socket through a local forwarder. A
//! page from elsewhere could then make that browser ask the agent for a switchover. Browsers say where a
//! request comes from; programs that are not browsers say nothing, and pass.

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{HOST, HeaderName, ORIGIN};
use axum::http::{HeaderMap, Response, Uri};
use axum::middleware::Next;
use axum::response::IntoResponse;
use pgherd_api::{Code, Error};

use super::answer::Refusal;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

pub(super) async fn refuse_other_origins(request: Request, next: Next) -> Response<Body> {
    match is_of_another_origin(request.headers()) {
        true => Refusal(Error::of(Code::CrossOrigin)).into_response(),
        false => next.run(request).await,
    }
}

fn is_of_another_origin(headers: &HeaderMap) -> bool {
    if let Some(site) = headers.get(SEC_FETCH_SITE) {
        // "none": typed into the address bar.
        if site != "same-origin" && site != "none" {
            return true;
        }
    }
    let Some(origin) = headers.get(ORIGIN) else { return false };
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let origin: Option<Uri> = origin.to_str().ok().and_then(|origin| origin.parse().ok());
    let authority = origin.as_ref().and_then(Uri::authority).map(|authority| authority.as_str());
    // "null", which sandboxed pages send, has no authority.
    authority.is_none() || authority != host
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(headers: &[(&str, &str)]) -> bool {
        let headers =
            headers.iter().map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap()));
        is_of_another_origin(&headers.collect())
    }

    #[test]
    fn programs_and_own_pages_pass_and_other_pages_do_not() {
        assert!(!refused(&[]), "a program");
        assert!(!refused(&[("host", "10.0.0.7:8009")]), "a program");
        assert!(!refused(&[("host", "h:1"), ("origin", "https://h:1"), ("sec-fetch-site", "same-origin")]));
        assert!(!refused(&[("host", "h:1"), ("sec-fetch-site", "none")]), "typed by a person");
        assert!(refused(&[("host", "h:1"), ("origin", "https://evil.example")]));
        assert!(refused(&[("host", "h:1"), ("origin", "https://h:2")]), "another port is another origin");
        assert!(refused(&[("host", "h:1"), ("origin", "null")]), "a sandboxed page");
        assert!(refused(&[("host", "h:1"), ("sec-fetch-site", "cross-site")]));
        assert!(refused(&[("host", "h:1"), ("sec-fetch-site", "same-site")]));
        assert!(refused(&[("origin", "https://h:1")]), "no host to compare with");
    }
}
