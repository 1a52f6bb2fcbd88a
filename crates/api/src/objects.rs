//! Objects of a repository that lies on a keeper's disk: what the other agents, and commands, ask for and are told.
//!
//! A request and an answer are each a line of JSON and, behind it, the bytes of an object. What a store cannot do is an answer, not an error: who asks has
//! to know whether an object is absent for certain. Every request may be sent again: objects are written once.

use bytes::{Bytes, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Largest body: an object, and the line before it.
pub const MAX_OBJECTS_BYTES: usize = 1100 * 1024 * 1024 + MAX_LINE_BYTES;
/// A page of ten thousand names.
pub const MAX_LINE_BYTES: usize = 16 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The directory, as the one who asks knows it from the herd file.
    pub repository: String,
    pub operation: Operation,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// The bytes are behind the line.
    Put {
        name: String,
    },
    Read {
        name: String,
        limit: u64,
    },
    ReadRange {
        name: String,
        from: u64,
        to: u64,
    },
    Head {
        name: String,
    },
    List {
        prefix: String,
        after: Option<String>,
        limit: usize,
    },
    Delete {
        name: String,
    },
    Sweep,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// `false`: an object with these very bytes was there.
    Put {
        created: bool,
    },
    /// The bytes are behind the line.
    Bytes,
    Head {
        object: Object,
    },
    Page {
        objects: Vec<Object>,
        more: bool,
    },
    Deleted,
    Swept {
        files: usize,
    },
    Failed {
        failure: Failure,
        cause: Option<String>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    pub name: String,
    pub bytes: u64,
    /// RFC 3339, by the keeper's clock.
    pub modified: String,
}

/// Why something is not known to have worked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    Absent,
    Present,
    Full,
    Denied,
    NoRepository,
    TooLarge,
    Misbehaving,
    #[serde(other)]
    Failed,
}

/// The line, and the bytes behind it.
pub fn join(line: &impl Serialize, bytes: &[u8]) -> Bytes {
    let line = serde_json::to_vec(line).expect("wire types have text keys and no failing serializer");
    let mut body = BytesMut::with_capacity(line.len() + 1 + bytes.len());
    body.extend_from_slice(&line);
    body.extend_from_slice(b"\n");
    body.extend_from_slice(bytes);
    body.freeze()
}

/// What [`join`] has put together.
pub fn split<T: DeserializeOwned>(body: &Bytes) -> Result<(T, Bytes), String> {
    let within = &body[..body.len().min(MAX_LINE_BYTES)];
    let end = within.iter().position(|byte| *byte == b'\n').ok_or("there is no line")?;
    let line = serde_json::from_slice(&body[..end]).map_err(|error| error.to_string())?;
    Ok((line, body.slice(end + 1..)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_and_any_bytes_come_apart_again() {
        for bytes in [&b""[..], b"\n", b"{}\n\0\xff"] {
            let operation = Operation::Put { name: "a/\n".to_owned() };
            let ask = Ask { repository: "/srv".to_owned(), operation };
            assert_eq!(split::<Ask>(&join(&ask, bytes)).unwrap(), (ask, Bytes::copy_from_slice(bytes)));
        }
        for broken in ["", "{}", "{}\n", "\n", "{\"repository\":\"/\",\"operation\":{\"burn\":{}}}\n"] {
            assert!(split::<Ask>(&Bytes::from(broken)).is_err(), "{broken:?}");
        }
        let later = "{\"failed\":{\"failure\":\"on_strike\",\"cause\":null}}\n";
        let told = Told::Failed { failure: Failure::Failed, cause: None };
        assert_eq!(split::<Told>(&Bytes::from(later)).unwrap().0, told, "nobody knows is never certain");
    }
}
