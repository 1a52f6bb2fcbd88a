//! What `pgherd history`, `explain` and `check` say, read as any other program would read it.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{ANSWER_DEADLINE, Herd};

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct HistoryEntry {
    pub term: Option<u64>,
    pub reason_code: String,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Explanation {
    pub node: String,
    pub reason_code: String,
    pub reason: String,
    pub waiting_for: Vec<String>,
    pub hint: Option<String>,
}

/// The exit code of `pgherd check`, and all that it prints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub exit: Option<i32>,
    pub text: String,
}

impl Herd {
    /// What has happened, as one agent tells it.
    pub fn history_from(&self, agent: &str) -> Result<Vec<HistoryEntry>, String> {
        #[derive(Deserialize)]
        struct History {
            entries: Vec<HistoryEntry>,
        }
        Ok(self.json::<History>(agent, "history")?.entries)
    }

    /// Why each node does what it does, as one agent tells it.
    pub fn explain_from(&self, agent: &str) -> Result<Vec<Explanation>, String> {
        #[derive(Deserialize)]
        struct Explain {
            nodes: Vec<Explanation>,
        }
        Ok(self.json::<Explain>(agent, "explain")?.nodes)
    }

    /// What a monitoring system is told by one agent. A warning is an answer, so its exit code is no failure.
    pub fn check_from(&self, agent: &str) -> Result<Check, String> {
        let output = self.pgherd(agent).arg("check").within(ANSWER_DEADLINE).try_output();
        let output = output.map_err(|overdue| overdue.to_string())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(Check { exit: output.status.code(), text })
    }

    pub(super) fn json<T: DeserializeOwned>(&self, agent: &str, command: &str) -> Result<T, String> {
        let output = self.pgherd(agent).args([command, "--json"]).within(ANSWER_DEADLINE).try_output();
        let output = output.map_err(|overdue| overdue.to_string())?;
        if !output.status.success() {
            return Err(format!("{agent}: {}", String::from_utf8_lossy(&output.stderr).trim()));
        }
        serde_json::from_slice(&output.stdout).map_err(|error| {
            let text = String::from_utf8_lossy(&output.stdout);
            format!("{agent} breaks the contract of pgherd {command} --json: {error}: {text}")
        })
    }
}
