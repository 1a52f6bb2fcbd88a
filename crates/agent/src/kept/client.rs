//! Objects on the disk of a keeper, asked for over its API.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use pgherd_api::client::{CallError, Client, ClientTls};
use pgherd_api::objects::{Ask, Object, Operation, Told};
use pgherd_backup::name::Name;
use pgherd_backup::store::{Failure, Listed, Page, Put, Remote, RemoteAnswer, Source, Store};
use pgherd_core::spec::backup::Through;
use pgherd_core::types::NodeName;

use super::of_wire;
use crate::pki::{Credentials, CredentialsError};

/// For an object of no size; a keeper that is cut off is to be noticed.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// And so much more for each MiB of one.
const EACH_MIB_WITHIN: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;
/// As much as one whose size is not known may have: a pack.
const PACK_BYTES: u64 = 64 * MIB;

/// The keeper's side of this repository.
struct Kept {
    client: Client,
    tls: Arc<ClientTls>,
    credentials: PathBuf,
    path: String,
}

/// What the keeper said that is no answer to what it was asked.
#[derive(Debug, thiserror::Error)]
enum Misunderstood {
    #[error("the keeper's answer belongs to another question")]
    Other,
    #[error("the keeper names an object {0}")]
    Object(String),
}

/// What the keeper's store says, in its words.
#[derive(Debug)]
struct Cause(String);

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Cause {}

/// `place` is for messages.
pub(crate) fn store(
    place: &str,
    keeper: &NodeName,
    path: &std::path::Path,
    through: &Through,
) -> Result<Store, CredentialsError> {
    let tls = Arc::new(Credentials::load(&through.credentials)?.client_tls()?);
    let client = Client::tls(&through.address, Some(keeper.as_str()), Arc::clone(&tls));
    let credentials = through.credentials.clone();
    let kept = Kept { client, tls, credentials, path: path.display().to_string() };
    Ok(Store::remote(place, Arc::new(kept)))
}

impl Kept {
    async fn ask(&self, operation: Operation, bytes: &[u8], expected_bytes: u64) -> Answered<(Told, Bytes)> {
        let mib = u32::try_from(expected_bytes.max(bytes.len() as u64) / MIB).unwrap_or(u32::MAX);
        let client = self.client.within(ANSWER_WITHIN + EACH_MIB_WITHIN.saturating_mul(mib));
        let ask = Ask { repository: self.path.clone(), operation };
        let answer = match client.objects(&ask, bytes).await {
            // Certificates are renewed beside whoever goes on for months.
            Err(CallError::NotTrusted { .. }) if self.renew() => client.objects(&ask, bytes).await,
            answer => answer,
        };
        match answer {
            Ok((Told::Failed { failure, cause }, _)) => {
                Err((of_wire(failure), Box::new(Cause(cause.unwrap_or_default()))))
            }
            Ok(told) => Ok(told),
            Err(CallError::Answered { http_status: 401 | 403, error, .. }) => {
                Err((Failure::Denied, Box::new(error)))
            }
            Err(error) => Err((Failure::Failed, Box::new(Cause(with_cause(&error))))),
        }
    }

    fn renew(&self) -> bool {
        Credentials::load(&self.credentials).is_ok_and(|fresh| fresh.replace_in(&self.tls).is_ok())
    }
}

type Answered<T> = Result<T, (Failure, Source)>;

fn with_cause(error: &CallError) -> String {
    let error = error.to_error();
    match error.cause {
        Some(cause) => format!("{}: {cause}", error.message),
        None => error.message,
    }
}

fn other<T>() -> Answered<T> {
    Err((Failure::Misbehaving, Box::new(Misunderstood::Other)))
}

fn listed(object: Object) -> Answered<Listed> {
    let wrong = || (Failure::Misbehaving, Box::new(Misunderstood::Object(object.name.clone())) as Source);
    let name = object.name.parse().map_err(|_| wrong())?;
    let modified = object.modified.parse().map_err(|_| wrong())?;
    Ok(Listed { name, bytes: object.bytes, modified })
}

impl Remote for Kept {
    fn put<'a>(&'a self, name: &'a Name, bytes: Bytes) -> RemoteAnswer<'a, Put> {
        async move {
            match self.ask(Operation::Put { name: name.to_string() }, &bytes, 0).await?.0 {
                Told::Put { created: true } => Ok(Put::Created),
                Told::Put { created: false } => Ok(Put::Same),
                _ => other(),
            }
        }
        .boxed()
    }

    fn read<'a>(&'a self, name: &'a Name, limit: u64) -> RemoteAnswer<'a, Bytes> {
        async move {
            match self
                .ask(Operation::Read { name: name.to_string(), limit }, &[], limit.min(PACK_BYTES))
                .await?
            {
                (Told::Bytes, bytes) if bytes.len() as u64 <= limit => Ok(bytes),
                _ => other(),
            }
        }
        .boxed()
    }

    fn read_range<'a>(&'a self, name: &'a Name, range: Range<u64>) -> RemoteAnswer<'a, Bytes> {
        async move {
            let Range { start: from, end: to } = range;
            let operation = Operation::ReadRange { name: name.to_string(), from, to };
            match self.ask(operation, &[], to.saturating_sub(from)).await? {
                (Told::Bytes, bytes) => Ok(bytes),
                _ => other(),
            }
        }
        .boxed()
    }

    fn head<'a>(&'a self, name: &'a Name) -> RemoteAnswer<'a, Listed> {
        async move {
            match self.ask(Operation::Head { name: name.to_string() }, &[], 0).await?.0 {
                Told::Head { object } => listed(object),
                _ => other(),
            }
        }
        .boxed()
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a Name>, limit: usize) -> RemoteAnswer<'a, Page> {
        async move {
            let (prefix, after) = (prefix.to_owned(), after.map(ToString::to_string));
            match self.ask(Operation::List { prefix, after, limit }, &[], 0).await?.0 {
                Told::Page { objects, more } => {
                    let objects = objects.into_iter().map(listed).collect::<Result<_, _>>()?;
                    Ok(Page { objects, more })
                }
                _ => other(),
            }
        }
        .boxed()
    }

    fn delete<'a>(&'a self, name: &'a Name) -> RemoteAnswer<'a, ()> {
        async move {
            match self.ask(Operation::Delete { name: name.to_string() }, &[], 0).await?.0 {
                Told::Deleted => Ok(()),
                _ => other(),
            }
        }
        .boxed()
    }

    fn sweep(&self) -> RemoteAnswer<'_, usize> {
        async move {
            match self.ask(Operation::Sweep, &[], 0).await?.0 {
                Told::Swept { files } => Ok(files),
                _ => other(),
            }
        }
        .boxed()
    }
}
