//! `[backup]`: where a cluster's WAL and base backups go, when base backups are taken, and for how long they stay.
//!
//! Secrets are files on each host; what the store keeps are their names. What is wrong with a repository among hosts is said in
//! [`check`](super::check).

use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::retention::Retention;
use crate::throttle::Floor;
use crate::types::NodeName;

pub const DEFAULT_SCHEDULE: &str = "0 2 * * *";
pub const DEFAULT_MINIMUM_REDUNDANCY: u32 = 1;
/// What is not a whole segment yet is put into the archive this often.
pub const DEFAULT_ARCHIVE_INTERVAL: Duration = Duration::from_secs(1);
pub const SHORTEST_ARCHIVE_INTERVAL: Duration = Duration::from_millis(100);
pub const LONGEST_ARCHIVE_INTERVAL: Duration = Duration::from_secs(3600);

/// Before the path of a directory.
pub const FILE: &str = "file://";
pub const S3: &str = "s3://";
/// Google Cloud Storage.
pub const GCS: &str = "gs://";
/// Azure Blob Storage.
pub const AZURE: &str = "azure://";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupSpec {
    pub repository: RepositorySpec,
    /// Five fields of cron, in UTC; `None`: base backups are taken when somebody asks, and the first one by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    pub retention: Retention,
    /// `check` warns when the newest base backup is older.
    #[serde(
        rename = "maximum_age_ms",
        with = "super::optional_millis",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub maximum_age: Option<Duration>,
    /// `None`: only whole segments are archived.
    #[serde(
        rename = "archive_interval_ms",
        with = "super::optional_millis",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub archive_interval: Option<Duration>,
    #[serde(default, skip_serializing_if = "Throttle::is_by_itself")]
    pub throttle: Throttle,
    /// When a backup is restored to see whether it can be, as `schedule`; `None`: when somebody asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill: Option<String>,
    /// In which directory; `None`: in that of the agent's state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill_dir: Option<PathBuf>,
    /// What is asked there: a database, `=` and a statement.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drill_queries: Vec<String>,
    /// It is a member of the durability rule: commits may wait until they are there.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub voter: bool,
}

impl BackupSpec {
    /// With the file's defaults.
    pub fn new(repository: RepositorySpec) -> BackupSpec {
        BackupSpec {
            repository,
            schedule: Some(DEFAULT_SCHEDULE.to_owned()),
            retention: Retention {
                policy: None,
                minimum_redundancy: DEFAULT_MINIMUM_REDUNDANCY,
                tiers: Default::default(),
            },
            maximum_age: None,
            archive_interval: Some(DEFAULT_ARCHIVE_INTERVAL),
            throttle: Throttle::ByItself,
            drill: None,
            drill_dir: None,
            drill_queries: Vec::new(),
            voter: false,
        }
    }
}

/// Whether a base backup is held back when the server becomes slow for its clients, and to which pace at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Throttle {
    /// [`Floor::Day`].
    #[default]
    ByItself,
    Never,
    /// To so many MiB a second.
    DownToMib(NonZeroU32),
}

impl Throttle {
    /// None: never.
    pub fn floor(self) -> Option<Floor> {
        match self {
            Throttle::ByItself => Some(Floor::Day),
            Throttle::Never => None,
            Throttle::DownToMib(mib) => Some(Floor::of_mib(mib)),
        }
    }

    fn is_by_itself(&self) -> bool {
        *self == Throttle::ByItself
    }
}

/// Where a repository is, and what opens it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepositorySpec {
    pub location: Location,
    /// Without one it is not encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<SecretFile>,
}

/// Where objects are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Location {
    /// The same one on each host.
    Directory(PathBuf),
    /// On the disk of this witness, through whose API everybody else comes to it.
    Kept {
        keeper: NodeName,
        path: PathBuf,
        /// Only in the file of a repository: agents know the way.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        through: Option<Through>,
    },
    S3 {
        /// `s3://bucket/folder`.
        url: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        region: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        endpoint: Option<String>,
        #[serde(default)]
        allow_http: bool,
        /// Files with the two parts of a key; without them the machine's own role is used.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        access_key_file: Option<PathBuf>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        secret_key_file: Option<PathBuf>,
    },
    Gcs {
        /// `gs://bucket/folder`.
        url: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        endpoint: Option<String>,
        #[serde(default)]
        allow_http: bool,
        /// The key of a service account in JSON; without it the machine's own role is used.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        service_account_file: Option<PathBuf>,
    },
    Azure {
        /// `azure://container/folder`.
        url: String,
        /// The storage account of the container.
        account: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        endpoint: Option<String>,
        #[serde(default)]
        allow_http: bool,
        /// Without one the machine's own role is used.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key: Option<AzureKeyFile>,
    },
}

/// What a storage account of Azure lets in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum AzureKeyFile {
    AccountKey(PathBuf),
    SasToken(PathBuf),
}

/// How a keeper is reached, and as whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Through {
    /// `host:port` of its API.
    pub address: String,
    /// Directory with a certificate of the herd, its key and the herd's authority.
    pub credentials: PathBuf,
}

/// As `repository` in the files: two of the same name are one place, as far as can be told from here.
impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Directory(path) => write!(f, "{FILE}{}", path.display()),
            Location::Kept { keeper, path, .. } => write!(f, "{FILE}{} on {keeper}", path.display()),
            Location::S3 { url, endpoint: Some(endpoint), .. } => write!(f, "{url} at {endpoint}"),
            Location::S3 { url, .. } => f.write_str(url),
            Location::Gcs { url, endpoint: Some(endpoint), .. } => write!(f, "{url} at {endpoint}"),
            Location::Gcs { url, .. } => f.write_str(url),
            Location::Azure { url, account, endpoint: Some(endpoint), .. } => {
                write!(f, "{url} of {account} at {endpoint}")
            }
            Location::Azure { url, account, .. } => write!(f, "{url} of {account}"),
        }
    }
}

/// What opens an encrypted repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum SecretFile {
    Passphrase(PathBuf),
    Key(PathBuf),
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;

    #[test]
    fn a_pace_is_stored_only_where_one_was_asked_for() {
        let mut spec =
            BackupSpec::new(RepositorySpec { location: Location::Directory("/b".into()), secret: None });
        let stored = serde_json::to_string(&spec).unwrap();
        assert!(!stored.contains("throttle"), "the version before could not read it: {stored}");
        assert_eq!(serde_json::from_str::<BackupSpec>(&stored).unwrap(), spec);
        for (throttle, text, floor) in [
            (Throttle::Never, r#""throttle":"never""#, None),
            (
                Throttle::DownToMib(NonZeroU32::new(20).unwrap()),
                r#""throttle":{"down_to_mib":20}"#,
                Some(Floor::Rate(NonZeroU64::new(20 * 1024 * 1024).unwrap())),
            ),
        ] {
            spec.throttle = throttle;
            let stored = serde_json::to_string(&spec).unwrap();
            assert!(stored.contains(text), "{stored}");
            assert_eq!(serde_json::from_str::<BackupSpec>(&stored).unwrap(), spec);
            assert_eq!(throttle.floor(), floor);
        }
    }

    #[test]
    fn places_are_stored_as_they_were_and_say_which_one_they_are() {
        for (stored, shown) in [
            (r#"{"directory":"/srv/backups"}"#, "file:///srv/backups"),
            (r#"{"s3":{"url":"s3://b/f","region":"eu","allow_http":false}}"#, "s3://b/f"),
            (
                r#"{"gcs":{"url":"gs://b/f","endpoint":"https://g","allow_http":false,"service_account_file":"/a"}}"#,
                "gs://b/f at https://g",
            ),
            (
                r#"{"azure":{"url":"azure://c/f","account":"shop","allow_http":false,"key":{"sas_token":"/t"}}}"#,
                "azure://c/f of shop",
            ),
        ] {
            let location: Location = serde_json::from_str(stored).unwrap();
            assert_eq!(location.to_string(), shown);
            assert_eq!(serde_json::to_string(&location).unwrap(), stored);
        }
    }
}
