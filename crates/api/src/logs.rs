//! `GET /v1/logs`: a node's agent and PostgreSQL log as one stream of JSON lines.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LogsQuery {
    /// Null: the node that answers.
    pub node: Option<String>,
    /// Go on with what is written from now on.
    #[serde(default)]
    pub follow: bool,
    /// So many of the last lines first; the server has a limit of its own.
    pub tail: Option<u32>,
}

/// One line of the stream, which is newline-delimited JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogLine {
    pub node: String,
    pub source: LogSource,
    /// RFC 3339; null where the line bore no time.
    pub at: Option<String>,
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogSource {
    Agent,
    Postgres,
}
