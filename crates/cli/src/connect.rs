//! Finding an agent to ask: on this host through its Unix socket, else by the URLs of `client.toml`.
//!
//! Any agent of a herd can answer for all of it, so the first one that does is good enough. Every request may be
//! repeated elsewhere: questions change nothing, changes carry an id or a generation, and a token or certificate
//! too many is worth nothing to anybody else.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pgherd_agent::files::agent::AgentFile;
use pgherd_agent::paths;
use pgherd_api::client::ClientTls;
use pgherd_api::{CallError, Client, Code, Endpoint};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::args::Global;
use crate::failure::Failure;
use crate::output::note;

mod client_file;

pub(crate) use client_file::{ClientFile, NAME as CLIENT_FILE};

/// For questions that an agent answers from memory. One that is frozen must not hold up the next for long.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// The agents that can be asked, in the order in which they are.
#[derive(Debug)]
pub(crate) struct Agents {
    clients: Vec<Client>,
    remote: bool,
    verbose: bool,
}

impl Agents {
    pub(crate) fn find(global: &Global) -> Result<Agents, Failure> {
        let dir = global.dir()?;
        let clients = match &global.url {
            Some(url) => by_urls(&ClientFile::load(&dir)?, std::slice::from_ref(url))?,
            None => {
                let sockets = sockets_in(&dir)?;
                let file = dir.join(CLIENT_FILE);
                if sockets.is_empty() && file.is_file() {
                    let file = ClientFile::load(&dir)?;
                    by_urls(&file, &file.urls)?
                } else {
                    sockets.into_iter().map(Client::unix).collect()
                }
            }
        };
        if clients.is_empty() {
            return Err(Failure::failed(format!("no herd or agent is set up in {}", dir.display()))
                .because(format!("there is neither an agent.toml nor a {CLIENT_FILE} in it"))
                .hint("pgherd up starts a herd on this machine")
                .hint("--dir names another directory, --url an agent on another host"));
        }
        let remote = matches!(clients[0].endpoint(), Endpoint::Tls { .. });
        let clients = clients.into_iter().map(|client| client.within(ANSWER_WITHIN)).collect();
        Ok(Agents { clients, remote, verbose: global.verbose > 0 })
    }

    /// Those of this machine, each of which knows its own logs.
    pub(crate) fn local(&self) -> &[Client] {
        if self.remote { &[] } else { &self.clients }
    }

    /// One that answers, for a request whose answer is a stream.
    pub(crate) async fn first_that_answers(&self) -> Result<Client, Failure> {
        self.call(async |client| client.status().await.map(|_| client.clone())).await
    }

    /// Asks one agent after the other until one has taken the call.
    pub(crate) async fn call<T>(
        &self,
        call: impl AsyncFn(&Client) -> Result<T, CallError>,
    ) -> Result<T, Failure> {
        self.call_within(ANSWER_WITHIN, call).await
    }

    pub(crate) async fn call_within<T>(
        &self,
        deadline: Duration,
        call: impl AsyncFn(&Client) -> Result<T, CallError>,
    ) -> Result<T, Failure> {
        let mut silent = Vec::new();
        for client in &self.clients {
            match call(&client.within(deadline)).await {
                Ok(answer) => {
                    if self.verbose {
                        note(&format!("asked {}", client.endpoint()));
                    }
                    return Ok(answer);
                }
                Err(error) if goes_to_the_next(&error) => {
                    if self.verbose {
                        note(&format!("{}: {}", client.endpoint(), reason_of(&error)));
                    }
                    silent.push(error);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(nobody_answered(silent))
    }
}

/// An agent that is not there, that hangs, or that cannot answer now leaves the question to another.
fn goes_to_the_next(error: &CallError) -> bool {
    match error {
        CallError::Answered { error, .. } => {
            [Code::NotReady, Code::Busy, Code::StoreUnavailable].iter().any(|code| error.is(*code))
        }
        // Trying others would hide that somebody else answers at an address of the herd.
        CallError::NotTrusted { .. } => false,
        _ => true,
    }
}

fn reason_of(error: &CallError) -> String {
    let body = error.to_error();
    body.cause.map_or(body.message.clone(), |cause| format!("{}: {cause}", body.message))
}

fn nobody_answered(mut errors: Vec<CallError>) -> Failure {
    // What an agent says of itself is worth more than the silence of others.
    if let Some(said) = errors.iter().position(|error| matches!(error, CallError::Answered { .. })) {
        return errors.swap_remove(said).into();
    }
    let timed_out = errors.iter().any(|error| matches!(error, CallError::DeadlinePassed { .. }));
    let message = "no agent of the herd answers";
    let failure = if timed_out { Failure::timed_out(message) } else { Failure::failed(message) };
    let failure = errors.iter().fold(failure, |failure, error| failure.because(reason_of(error)));
    if timed_out {
        failure.hint("an agent that is there and silent may be frozen or starved: look at its host")
    } else {
        failure.hint("is the herd running? pgherd up starts it, and goes on where it was")
    }
}

/// The sockets of the agents whose files are in a directory: of this host's one agent, or of a herd on this
/// machine, which has one directory per node.
pub(crate) fn sockets_in(dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    let state_dirs = agent_files_in(dir)?.into_iter().map(|file| file.state_dir);
    Ok(state_dirs.map(|state_dir| paths::api_socket(&state_dir)).collect())
}

/// The agent files of a directory, in the order of their names.
pub(crate) fn agent_files_in(dir: &Path) -> Result<Vec<AgentFile>, Failure> {
    let mut places = vec![dir.join("agent.toml")];
    match std::fs::read_dir(dir) {
        Ok(entries) => {
            let below = entries.filter_map(|entry| Some(entry.ok()?.path().join("agent.toml")));
            places.extend(below);
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Failure::io("read", dir, &error)),
    }
    places.sort();
    let mut files = Vec::new();
    for place in places {
        match std::fs::read_to_string(&place) {
            Ok(text) => {
                let shown = place.display().to_string();
                files.push(AgentFile::read(&shown, &text).map_err(Failure::from)?);
            }
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
                ) => {}
            Err(error) => return Err(Failure::io("read", &place, &error)),
        }
    }
    Ok(files)
}

fn by_urls(file: &ClientFile, urls: &[String]) -> Result<Vec<Client>, Failure> {
    let tls = Arc::new(file.tls()?);
    urls.iter()
        .map(|url| {
            let address = url.strip_prefix("https://").map(|rest| rest.trim_end_matches('/'));
            match address.filter(|address| !address.is_empty() && !address.contains('/')) {
                Some(address) => Ok(Client::tls(address, None, Arc::clone(&tls))),
                None => Err(Failure::usage(format!("\"{url}\" is not the URL of an agent"))
                    .hint("it reads https://host:port, with the port of the agent's API (8009)")),
            }
        })
        .collect()
}

impl ClientFile {
    fn tls(&self) -> Result<ClientTls, Failure> {
        let pem = |path: &Path, error: rustls::pki_types::pem::Error| {
            Failure::failed(format!("cannot read {}", path.display()))
                .because(error)
                .hint("pgherd operator add makes the three files and client.toml anew")
        };
        let certificates = |path: &Path| -> Result<Vec<CertificateDer<'static>>, Failure> {
            let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
            read.map_err(|error| pem(path, error))
        };
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| pem(&self.key, error))?;
        ClientTls::new(&certificates(&self.ca)?, certificates(&self.certificate)?, key)
            .map_err(|error| Failure::failed("the operator's certificate cannot be used").because(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unreachable(peer: &str) -> CallError {
        CallError::Unreachable { peer: peer.to_owned(), cause: "connection refused".to_owned() }
    }

    fn answered(code: Code) -> CallError {
        let error = pgherd_api::Error::of(code);
        CallError::Answered { peer: "a".to_owned(), http_status: code.http_status(), error }
    }

    #[test]
    fn a_refusal_is_final_and_silence_is_not() {
        assert!(goes_to_the_next(&unreachable("a")));
        assert!(goes_to_the_next(&answered(Code::NotReady)));
        assert!(!goes_to_the_next(&answered(Code::RedundancyTooLow)));
        let stranger = CallError::NotTrusted { peer: "a".to_owned(), cause: "another herd".to_owned() };
        assert!(!goes_to_the_next(&stranger));
    }

    #[test]
    fn what_silent_agents_come_to() {
        let frozen = CallError::DeadlinePassed {
            peer: "b".to_owned(),
            deadline_ms: 3000,
            phase: pgherd_api::client::Phase::Waiting,
        };
        assert_eq!(nobody_answered(vec![unreachable("a"), unreachable("b")]).exit_code(), 1);
        assert_eq!(nobody_answered(vec![unreachable("a"), frozen]).exit_code(), 4);
        let said = nobody_answered(vec![unreachable("a"), answered(Code::StoreUnavailable)]);
        assert!(format!("{said:?}").contains("PGH-STORE-UNAVAILABLE"));
    }

    #[test]
    fn a_directory_without_agents_has_no_sockets() {
        let dir = tempfile::tempdir().unwrap();
        assert!(sockets_in(dir.path()).unwrap().is_empty());
        assert!(sockets_in(&dir.path().join("absent")).unwrap().is_empty());
    }
}
