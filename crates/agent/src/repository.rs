//! Opens a repository from what a file says of it.
//!
//! Left out: what is done with it. Hazard: secrets that others can read; a file of them that is open to others is refused.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use pgherd_backup::format::{OpenError, Repository};
use pgherd_backup::keys::{Secret, SecretError};
use pgherd_backup::store::{Credentials, Store, StoreError};
use pgherd_core::spec::RepositorySpec;
use pgherd_core::spec::backup::{Location, SecretFile};

use crate::files::Findings;
use crate::files::repository::read as read_file;

/// A file of a secret has one line.
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
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl RepositoryError {
    pub fn hint(&self) -> Option<String> {
        match self {
            RepositoryError::OpenToOthers { path } => Some(format!("chmod 600 {}", path.display())),
            RepositoryError::Open(OpenError::NoRepository { .. }) => Some(
                "pgherd backup init makes one; if there was one, see whether its disk is mounted".to_owned(),
            ),
            RepositoryError::Open(OpenError::SecretNeeded { .. }) => {
                Some("name it as passphrase_file or key_file in the repository's file".to_owned())
            }
            RepositoryError::Open(OpenError::NotEncrypted { .. }) => {
                Some("leave passphrase_file and key_file out, or make another repository".to_owned())
            }
            _ => None,
        }
    }
}

/// Opens the repository that a file names.
pub async fn open(file: &Path) -> Result<Repository, RepositoryError> {
    open_at(&named_in(file)?).await
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

fn named_in(file: &Path) -> Result<RepositorySpec, RepositoryError> {
    read_file(&file.display().to_string(), &read(file)?).map_err(RepositoryError::File)
}

fn place(spec: &RepositorySpec) -> Result<(Store, Option<Secret>), RepositoryError> {
    let secret = match &spec.secret {
        None => None,
        Some(SecretFile::Passphrase(path)) => Some(secret(path, Secret::passphrase)?),
        Some(SecretFile::Key(path)) => Some(secret(path, Secret::key)?),
    };
    let store = match spec.location.clone() {
        Location::Directory(path) if !path.is_dir() => return Err(RepositoryError::NoDirectory { path }),
        Location::Directory(path) => Store::directory(path),
        Location::S3 { url, region, endpoint, allow_http, access_key_file, secret_key_file } => {
            let line = |file: Option<PathBuf>| file.map(|file| read_secret(&file)).transpose();
            let (access_key, secret_key) = (line(access_key_file)?, line(secret_key_file)?);
            let trimmed = |text: Option<String>| text.map(|text| text.trim().to_owned());
            let (access_key, secret_key) = (trimmed(access_key), trimmed(secret_key));
            Store::s3(&url, Credentials { access_key, secret_key, region, endpoint, allow_http })?
        }
    };
    Ok((store, secret))
}

fn secret(path: &Path, parse: fn(&str) -> Result<Secret, SecretError>) -> Result<Secret, RepositoryError> {
    let content = read_secret(path)?;
    parse(&content).map_err(|source| RepositoryError::NoSecret { path: path.to_owned(), source })
}

fn read_secret(path: &Path) -> Result<String, RepositoryError> {
    let failed = |source| RepositoryError::Read { path: path.to_owned(), source };
    let found = std::fs::metadata(path).map_err(failed)?;
    if found.permissions().mode() & 0o077 != 0 {
        return Err(RepositoryError::OpenToOthers { path: path.to_owned() });
    }
    if found.len() > MAX_SECRET_BYTES {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, "it is too long for one line")));
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
}
