//! Opens a repository from what a file says of it.
//!
//! Left out: what is done with it. Hazard: secrets that others can read; a file of them that is open to others is refused.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use pgherd_backup::format::{OpenError, Repository};
use pgherd_backup::keys::{KeysError, Secret, SecretError};
use pgherd_backup::store::{AzureCredentials, AzureKey, Credentials, GcsCredentials, Store, StoreError};
use pgherd_core::spec::RepositorySpec;
use pgherd_core::spec::backup::{AzureKeyFile, Location, SecretFile};
use pgherd_core::types::NodeName;

use crate::files::Findings;
use crate::files::repository::read as read_file;
use crate::kept;
use crate::pki::CredentialsError;

/// A file of a secret has one line, or the key of a service account, which is half as long.
const MAX_SECRET_BYTES: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} can be read by others, and has a secret in it")]
    OpenToOthers { path: PathBuf },
    #[error("{path} is no secret")]
    NoSecret { path: PathBuf, source: SecretError },
    #[error("{0}")]
    File(Findings),
    #[error("there is no directory {path}")]
    NoDirectory { path: PathBuf },
    #[error("the certificate in {path} cannot be used")]
    Credentials { path: PathBuf, source: CredentialsError },
    #[error("nothing says how keeper {keeper} is reached")]
    NoWay { keeper: NodeName },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Keys(#[from] KeysError),
    #[error("the repository in {place} is not encrypted")]
    NotEncrypted { place: String },
    #[error("the repository in {place} is opened by that secret already")]
    SameSecret { place: String },
}

impl RepositoryError {
    pub fn hint(&self) -> Option<String> {
        match self {
            RepositoryError::Read { path, source } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some(format!(
                    "the user who runs this has to be able to read it, which is postgres for agents that root has \
                     started: chown postgres {}",
                    path.display()
                ))
            }
            RepositoryError::OpenToOthers { path } => Some(format!("chmod 600 {}", path.display())),
            RepositoryError::Open(OpenError::NoRepository { .. }) => Some(
                "pgherd backup init makes one; if there was one, see whether its disk is mounted".to_owned(),
            ),
            RepositoryError::Credentials { path, .. } => Some(format!(
                "run it as the user who owns {}: runuser -u postgres -- pgherd …",
                path.display()
            )),
            RepositoryError::NoWay { .. } => Some(
                "keeper_address = \"HOST:PORT\" and credentials = DIR, as in repository.toml in the state directory of a node".to_owned(),
            ),
            RepositoryError::NotEncrypted { .. } => {
                Some("what is in it cannot be encrypted afterwards: make another one with a passphrase_file, and take a backup".to_owned())
            }
            RepositoryError::SameSecret { .. } => Some("--new-data-key changes what seals from now on".to_owned()),
            RepositoryError::Keys(KeysError::Rotated { .. }) => {
                Some("the file has to name the newest secret: put it there, and try again".to_owned())
            }
            RepositoryError::Open(OpenError::SecretNeeded { .. }) => {
                Some("name it as passphrase_file or key_file in the repository's file".to_owned())
            }
            RepositoryError::Open(OpenError::NotEncrypted { .. }) => {
                Some("leave passphrase_file and key_file out, or make another repository".to_owned())
            }
            RepositoryError::Store(error) | RepositoryError::Open(OpenError::Store(error)) => {
                error.hint().map(str::to_owned)
            }
            _ => None,
        }
    }
}

/// Opens the repository that a file names.
pub async fn open(file: &Path) -> Result<Repository, RepositoryError> {
    open_at(&named_in(file)?).await
}

/// There is a repository, and not the one that the record knows.
#[derive(Debug, thiserror::Error)]
#[error(
    "the repository in {place} is another one than the cluster's: it has the identifier {found}, and not {known}"
)]
pub(crate) struct Another {
    pub(crate) place: String,
    pub(crate) known: String,
    pub(crate) found: String,
}

impl Another {
    pub(crate) const HINT: &str = "mount the same directory on all hosts, or name another repository";
}

/// Is it the one with this identifier?
pub(crate) fn must_be(known: &str, repository: &Repository) -> Result<(), Another> {
    let found = &repository.format().repository;
    if found == known {
        return Ok(());
    }
    let place = repository.store().place().to_owned();
    Err(Another { place, known: known.to_owned(), found: found.clone() })
}

/// Opens the repository that a herd file names.
pub async fn open_at(spec: &RepositorySpec) -> Result<Repository, RepositoryError> {
    let (store, secret) = place(spec)?;
    Ok(Repository::open(store, secret.as_ref()).await?)
}

/// A repository that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    pub place: String,
    pub encrypted: bool,
}

/// Makes the repository that a file names, where there is none.
pub async fn create(file: &Path) -> Result<Made, RepositoryError> {
    let made = create_at(&named_in(file)?).await?;
    Ok(Made { place: made.store().place().to_owned(), encrypted: made.format().encrypted })
}

/// Makes the repository that a herd file names, where there is none.
pub async fn create_at(spec: &RepositorySpec) -> Result<Repository, RepositoryError> {
    let (store, secret) = place(spec)?;
    Ok(Repository::create(store, secret.as_ref(), Timestamp::now()).await?)
}

/// What opens a repository from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rekey {
    /// That of this file, beside the secret that the repository's file names, until that one is retired.
    Passphrase(PathBuf),
    /// The same with a key.
    Key(PathBuf),
    /// The same secret; what is written from now on is sealed by a data key of its own.
    DataKey,
    /// Former secrets open nothing any more.
    Retire,
}

/// What became of the keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rekeyed {
    pub place: String,
    /// Wrappings are counted.
    pub generation: u32,
    /// Wrappings that are gone.
    pub retired: usize,
}

/// Wraps the keys of the repository that a file names anew, or deletes former wrappings. Nothing else is rewritten.
pub async fn rekey(file: &Path, what: Rekey) -> Result<Rekeyed, RepositoryError> {
    let (store, secret) = place(&named_in(file)?)?;
    let repository = Repository::open(store, secret.as_ref()).await?;
    let place = repository.store().place().to_owned();
    let (Some(keys), Some(secret)) = (repository.keys(), secret) else {
        return Err(RepositoryError::NotEncrypted { place });
    };
    let store = repository.store();
    let new = match &what {
        Rekey::Passphrase(path) => Some(self::secret(path, Secret::passphrase)?),
        Rekey::Key(path) => Some(self::secret(path, Secret::key)?),
        Rekey::DataKey | Rekey::Retire => None,
    };
    if new.as_ref() == Some(&secret) {
        return Err(RepositoryError::SameSecret { place });
    }
    let (generation, retired) = match what {
        Rekey::Retire => (keys.generation(), keys.retire(store, &secret).await?),
        _ => {
            let add = what == Rekey::DataKey;
            (keys.rotate(store, new.as_ref().unwrap_or(&secret), add).await?.generation(), 0)
        }
    };
    Ok(Rekeyed { place, generation, retired })
}

fn secret_of(file: &SecretFile) -> Result<Secret, RepositoryError> {
    match file {
        SecretFile::Passphrase(path) => secret(path, Secret::passphrase),
        SecretFile::Key(path) => secret(path, Secret::key),
    }
}

fn named_in(file: &Path) -> Result<RepositorySpec, RepositoryError> {
    read_file(&file.display().to_string(), &read(file)?).map_err(RepositoryError::File)
}

fn place(spec: &RepositorySpec) -> Result<(Store, Option<Secret>), RepositoryError> {
    let secret = spec.secret.as_ref().map(secret_of).transpose()?;
    let store = match spec.location.clone() {
        Location::Directory(path) if !path.is_dir() => return Err(RepositoryError::NoDirectory { path }),
        Location::Directory(path) => Store::directory(path),
        Location::Kept { keeper, path, through: Some(through) } => {
            let opened = kept::client::store(&spec.location.to_string(), &keeper, &path, &through);
            opened.map_err(|source| RepositoryError::Credentials { path: through.credentials, source })?
        }
        Location::Kept { keeper, .. } => return Err(RepositoryError::NoWay { keeper }),
        Location::S3 { url, region, endpoint, allow_http, access_key_file, secret_key_file } => {
            let access_key = access_key_file.as_deref().map(read_key).transpose()?;
            let secret_key = secret_key_file.as_deref().map(read_key).transpose()?;
            Store::s3(&url, Credentials { access_key, secret_key, region, endpoint, allow_http })?
        }
        Location::Gcs { url, endpoint, allow_http, service_account_file } => {
            let service_account = service_account_file.as_deref().map(read_key).transpose()?;
            Store::gcs(&url, GcsCredentials { service_account, endpoint, allow_http })?
        }
        Location::Azure { url, account, endpoint, allow_http, key } => {
            let key = match key {
                Some(AzureKeyFile::AccountKey(path)) => Some(AzureKey::Account(read_key(&path)?)),
                Some(AzureKeyFile::SasToken(path)) => Some(AzureKey::Sas(read_key(&path)?)),
                None => None,
            };
            Store::azure(&url, AzureCredentials { account, key, endpoint, allow_http })?
        }
    };
    Ok((store, secret))
}

fn secret(path: &Path, parse: fn(&str) -> Result<Secret, SecretError>) -> Result<Secret, RepositoryError> {
    let content = read_secret(path)?;
    parse(&content).map_err(|source| RepositoryError::NoSecret { path: path.to_owned(), source })
}

fn read_key(path: &Path) -> Result<String, RepositoryError> {
    Ok(read_secret(path)?.trim().to_owned())
}

fn read_secret(path: &Path) -> Result<String, RepositoryError> {
    let failed = |source| RepositoryError::Read { path: path.to_owned(), source };
    let found = std::fs::metadata(path).map_err(failed)?;
    if found.permissions().mode() & 0o077 != 0 {
        return Err(RepositoryError::OpenToOthers { path: path.to_owned() });
    }
    if found.len() > MAX_SECRET_BYTES {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, "it is too long for a secret")));
    }
    read(path)
}

fn read(path: &Path) -> Result<String, RepositoryError> {
    std::fs::read_to_string(path).map_err(|source| RepositoryError::Read { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, content: &str, mode: u32) {
        std::fs::write(path, content).unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }

    #[tokio::test]
    async fn a_repository_is_made_once_and_opened_with_its_secret() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let file = at("repository.toml");
        let place = format!("repository = \"file://{}\"\n", at("objects").display());
        write(&file, &format!("{place}passphrase_file = \"{}\"\n", at("secret").display()), 0o644);
        assert!(matches!(open(&file).await, Err(RepositoryError::Read { path, .. }) if path == at("secret")));
        write(&at("secret"), "correct horse battery\n", 0o644);
        let refused = create(&file).await.unwrap_err();
        assert!(refused.hint().is_some_and(|hint| hint.starts_with("chmod 600")), "{refused}");
        write(&at("secret"), "correct horse battery\n", 0o600);
        let refused = create(&file).await.unwrap_err();
        assert!(
            matches!(&refused, RepositoryError::NoDirectory { path } if *path == at("objects")),
            "{refused}"
        );
        std::fs::create_dir(at("objects")).unwrap();
        let refused = open(&file).await.unwrap_err();
        assert!(matches!(refused, RepositoryError::Open(OpenError::NoRepository { .. })), "{refused}");
        create(&file).await.unwrap();
        assert!(matches!(create(&file).await, Err(RepositoryError::Open(OpenError::Exists { .. }))));
        open(&file).await.unwrap();
        write(&at("secret"), "another passphrase\n", 0o600);
        assert!(matches!(open(&file).await, Err(RepositoryError::Open(OpenError::Keys(_)))));
        write(&file, &place, 0o644);
        assert!(matches!(open(&file).await, Err(RepositoryError::Open(OpenError::SecretNeeded { .. }))));
    }

    #[test]
    fn who_must_be_able_to_read_a_secret_is_said_where_it_cannot_be_read() {
        let hint = |kind: io::ErrorKind| {
            RepositoryError::Read { path: "/etc/pgherd/key".into(), source: kind.into() }.hint()
        };
        let denied = hint(io::ErrorKind::PermissionDenied).unwrap();
        assert!(denied.contains("chown postgres /etc/pgherd/key"), "{denied}");
        assert_eq!(hint(io::ErrorKind::NotFound), None);
    }

    #[tokio::test]
    async fn a_secret_is_replaced_host_by_host_and_then_retired() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("objects")).unwrap();
        write(&at("old"), "correct horse battery\n", 0o600);
        write(&at("new"), &format!("{}\n", "5".repeat(64)), 0o600);
        let place = format!("repository = \"file://{}\"\n", at("objects").display());
        let with = |key: &str, secret: &str| format!("{place}{key} = \"{}\"\n", at(secret).display());
        let (former, latter, plain) = (at("former.toml"), at("latter.toml"), at("plain.toml"));
        write(&former, &with("passphrase_file", "old"), 0o644);
        write(&latter, &with("key_file", "new"), 0o644);
        create(&former).await.unwrap();
        assert!(open(&latter).await.is_err());

        let new = || Rekey::Key(at("new"));
        assert_eq!(rekey(&former, new()).await.unwrap().generation, 2);
        open(&former).await.unwrap();
        open(&latter).await.unwrap();
        let late = rekey(&former, Rekey::DataKey).await.unwrap_err();
        assert!(
            matches!(&late, RepositoryError::Keys(KeysError::Rotated { .. })) && late.hint().is_some(),
            "{late}"
        );
        assert!(rekey(&former, Rekey::Retire).await.is_err(), "only who has the newest one retires others");
        open(&former).await.unwrap();
        assert!(matches!(rekey(&latter, new()).await, Err(RepositoryError::SameSecret { .. })));
        assert_eq!(rekey(&latter, Rekey::DataKey).await.unwrap().generation, 3);
        let retired = rekey(&latter, Rekey::Retire).await.unwrap();
        assert_eq!((retired.generation, retired.retired), (3, 2));
        open(&latter).await.unwrap();
        assert!(matches!(open(&former).await, Err(RepositoryError::Open(OpenError::Keys(_)))));

        std::fs::create_dir(at("bare")).unwrap();
        write(&plain, &format!("repository = \"file://{}\"\n", at("bare").display()), 0o644);
        create(&plain).await.unwrap();
        let refused = rekey(&plain, Rekey::DataKey).await.unwrap_err();
        assert!(matches!(&refused, RepositoryError::NotEncrypted { .. }) && refused.hint().is_some());
    }
}
