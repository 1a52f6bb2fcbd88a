//! `repository.toml`: where a repository of backups is and what opens it, for commands that run without an agent: `archive_command`
//! and `restore_command` of a server that no herd has, and of a copy that was restored somewhere else.
//!
//! Hazard: secrets. They stand in files of their own, which the file names, and are never part of a command line.

use std::path::{Path, PathBuf};

use pgherd_core::spec::RepositorySpec;
use pgherd_core::spec::backup::{AZURE, AzureKeyFile, FILE, GCS, Location, S3, SecretFile, Through};
use pgherd_core::types::NodeName;

use super::finding::{Findings, Kind, Mistake};
use super::reader::{Key, Read, Reader, Section, Table, key};

pub(super) const NONE: &str = "none";

/// What a place of a repository looks like, for hints.
pub(super) const PLACES: &str = "repository = \"file:///srv/backups\", \"s3://bucket/folder\", \"gs://bucket/folder\" or \"azure://container/folder\"";

/// The keys of a repository, which the herd file has, too.
pub(super) const KEYS: [Key; 13] = [
    key(
        "repository",
        "a text",
        "\"s3://bucket/shop\"",
        "",
        "s3://bucket/folder, gs://bucket/folder (Google), azure://container/folder, or file:///directory",
    ),
    key(
        "keeper",
        "a name",
        "\"w\"",
        NONE,
        "the [[witness]] on whose disk the directory is, for all others to reach it through its agent",
    ),
    key("region", "a text", "\"eu-central-1\"", "us-east-1", "of S3"),
    key(
        "endpoint",
        "a text",
        "\"https://minio.example:9000\"",
        NONE,
        "of a store that is not Amazon's, Google's or Microsoft's own",
    ),
    key("allow_http", "true or false", "true", "false", "whether the endpoint may be spoken to without TLS"),
    key(
        "access_key_file",
        "a path",
        "\"/etc/pgherd/s3.id\"",
        NONE,
        "for S3: a file with the name of the access key",
    ),
    key(
        "secret_key_file",
        "a path",
        "\"/etc/pgherd/s3.key\"",
        NONE,
        "a file with its secret, for its owner only",
    ),
    key(
        "service_account_file",
        "a path",
        "\"/etc/pgherd/gcs.json\"",
        NONE,
        "for gs://: a service account's key in JSON, for its owner only",
    ),
    key("account", "a text", "\"shopbackups\"", NONE, "for azure://: the storage account"),
    key(
        "account_key_file",
        "a path",
        "\"/etc/pgherd/azure.key\"",
        NONE,
        "a file with a key of the account, for its owner only",
    ),
    key(
        "sas_token_file",
        "a path",
        "\"/etc/pgherd/azure.sas\"",
        NONE,
        "in place of an account's key: a file with a SAS token, for its owner only",
    ),
    key(
        "passphrase_file",
        "a path",
        "\"/etc/pgherd/passphrase\"",
        NONE,
        "what encrypts it: one line, for its owner only",
    ),
    key(
        "key_file",
        "a path",
        "\"/etc/pgherd/repository.key\"",
        NONE,
        "in place of a passphrase: 64 hexadecimal digits",
    ),
];

/// What only the file of a repository says: agents know each other.
const OWN_KEYS: [Key; 2] = [
    key("keeper_address", "a text", "\"192.0.2.40:8009\"", NONE, "host and port of the keeper's API"),
    key(
        "credentials",
        "a path",
        "\"/var/lib/pgherd/pki\"",
        NONE,
        "directory with a certificate of the herd, its key and the herd's authority",
    ),
];

static ALL_KEYS: [Key; 15] = {
    let ([a, b, c, d, e, f, g, h, i, j, k, l, m], [n, o]) = (KEYS, OWN_KEYS);
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o]
};

static TOP: Section = Section { header: "", keys: &ALL_KEYS };

/// Reads a repository file; `file` is its name for messages.
pub fn read(file: &str, text: &str) -> Result<RepositorySpec, Findings> {
    let (mut reader, top) = Reader::parse(text);
    let top = reader.top(&top, &TOP);
    let mut read = read_keys(&mut reader, &top);
    let address = reader.text(&top, "keeper_address").some();
    let credentials = reader.text(&top, "credentials").some().map(PathBuf::from);
    match read.as_mut().map(|read| &mut read.location) {
        Some(Location::Kept { through, .. }) => match (address, credentials) {
            (Some(address), Some(credentials)) => *through = Some(Through { address, credentials }),
            _ => {
                let span = reader.key_span_of(&top.at.key("keeper"));
                let message = "keeper is given without keeper_address and credentials".to_owned();
                let hint = "the file in the state directory of a node has all three".to_owned();
                reader.mistake(Mistake::new(Kind::BrokenRule, span, message).hint(hint));
            }
        },
        _ => {
            let keys = ["keeper_address", "credentials"];
            without_meaning(&mut reader, &top, &keys, "a place without a keeper");
        }
    }
    match read {
        Some(repository) if !reader.has_errors() => Ok(repository),
        _ => Err(reader.finish(file)),
    }
}

/// Keys that say nothing of `what`.
fn without_meaning(reader: &mut Reader<'_>, table: &Table<'_>, keys: &[&str], what: &str) {
    for key in keys {
        if reader.has(&table.at.key(*key)) {
            let span = reader.key_span_of(&table.at.key(*key));
            let message = format!("\"{key}\" has no meaning for {what}");
            reader.mistake(Mistake::new(Kind::BrokenRule, span, message).hint("leave it out"));
        }
    }
}

/// The file; reading it back gives the same values.
pub fn write(repository: &RepositorySpec) -> String {
    let quoted = |text: &str| toml_edit::Value::from(text).to_string();
    lines(repository).into_iter().fold(String::new(), |file, (key, value)| {
        let value = match value {
            Value::Text(text) => quoted(&text),
            Value::Switch(on) => on.to_string(),
        };
        file + &format!("{key} = {value}\n")
    })
}

pub(super) enum Value {
    Text(String),
    Switch(bool),
}

/// What is not a default, in the order of the reference.
pub(super) fn lines(repository: &RepositorySpec) -> Vec<(&'static str, Value)> {
    let text = |path: &Path| Value::Text(path.display().to_string());
    let mut lines = Vec::new();
    match &repository.location {
        Location::Directory(dir) => {
            lines.push(("repository", Value::Text(format!("{FILE}{}", dir.display()))));
        }
        Location::Kept { keeper, path, through } => {
            lines.push(("repository", Value::Text(format!("{FILE}{}", path.display()))));
            lines.push(("keeper", Value::Text(keeper.to_string())));
            if let Some(Through { address, credentials }) = through {
                lines.push(("keeper_address", Value::Text(address.clone())));
                lines.push(("credentials", text(credentials)));
            }
        }
        Location::S3 { url, region, endpoint, allow_http, access_key_file, secret_key_file } => {
            lines.push(("repository", Value::Text(url.clone())));
            lines.extend(region.clone().map(|region| ("region", Value::Text(region))));
            lines.extend(endpoint.clone().map(|endpoint| ("endpoint", Value::Text(endpoint))));
            lines.extend(allow_http.then_some(("allow_http", Value::Switch(true))));
            lines.extend(access_key_file.as_deref().map(|file| ("access_key_file", text(file))));
            lines.extend(secret_key_file.as_deref().map(|file| ("secret_key_file", text(file))));
        }
        Location::Gcs { url, endpoint, allow_http, service_account_file } => {
            lines.push(("repository", Value::Text(url.clone())));
            lines.extend(endpoint.clone().map(|endpoint| ("endpoint", Value::Text(endpoint))));
            lines.extend(allow_http.then_some(("allow_http", Value::Switch(true))));
            lines.extend(service_account_file.as_deref().map(|file| ("service_account_file", text(file))));
        }
        Location::Azure { url, account, endpoint, allow_http, key } => {
            lines.push(("repository", Value::Text(url.clone())));
            lines.extend(endpoint.clone().map(|endpoint| ("endpoint", Value::Text(endpoint))));
            lines.extend(allow_http.then_some(("allow_http", Value::Switch(true))));
            lines.push(("account", Value::Text(account.clone())));
            lines.extend(key.as_ref().map(|key| match key {
                AzureKeyFile::AccountKey(file) => ("account_key_file", text(file)),
                AzureKeyFile::SasToken(file) => ("sas_token_file", text(file)),
            }));
        }
    }
    match &repository.secret {
        Some(SecretFile::Passphrase(file)) => lines.push(("passphrase_file", text(file))),
        Some(SecretFile::Key(file)) => lines.push(("key_file", text(file))),
        None => {}
    }
    lines
}

/// Keys that say where a repository is; they mean nothing without the place itself.
pub(super) fn says_where(reader: &Reader<'_>, table: &Table<'_>) -> bool {
    KEYS.iter().any(|key| reader.has(&table.at.key(key.name)))
}

/// The kinds of places.
#[derive(Clone, Copy, PartialEq)]
enum PlaceKind {
    Directory,
    S3,
    Gcs,
    Azure,
}

/// Keys of other kinds of places than this one. An account that nobody asked for is a place that is not the meant one.
fn say_nothing_of(reader: &mut Reader<'_>, table: &Table<'_>, kind: PlaceKind) {
    let (what, meant): (_, &[&str]) = match kind {
        PlaceKind::Directory => ("a directory", &["keeper"]),
        PlaceKind::S3 => {
            ("a bucket of S3", &["region", "endpoint", "allow_http", "access_key_file", "secret_key_file"])
        }
        PlaceKind::Gcs => ("a bucket of Google's", &["endpoint", "allow_http", "service_account_file"]),
        PlaceKind::Azure => (
            "a container of Azure",
            &["endpoint", "allow_http", "account", "account_key_file", "sas_token_file"],
        ),
    };
    let of_all = ["repository", "passphrase_file", "key_file", "keeper"];
    let other = KEYS.iter().map(|key| key.name);
    let other: Vec<&str> = other.filter(|key| !of_all.contains(key) && !meant.contains(key)).collect();
    without_meaning(reader, table, &other, what);
    if kind != PlaceKind::Directory {
        without_meaning(reader, table, &["keeper"], "an object store, which everybody reaches");
    }
}

/// It becomes a part of a host's name.
fn is_account(name: &str) -> bool {
    (3..=24).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

/// The repository that the keys of a table say; `None` if they cannot be read, which has been told then.
pub(super) fn read_keys(reader: &mut Reader<'_>, table: &Table<'_>) -> Option<RepositorySpec> {
    let path = |reader: &mut Reader<'_>, key: &str| reader.text(table, key).some().map(PathBuf::from);
    let url = reader.text(table, "repository");
    let keeper = reader.parsed::<NodeName>(table, "keeper");
    let region = reader.text(table, "region").some();
    let endpoint = reader.text(table, "endpoint").some();
    let allow_http = reader.switch(table, "allow_http").or(false);
    let access_key_file = path(reader, "access_key_file");
    let secret_key_file = path(reader, "secret_key_file");
    let service_account_file = path(reader, "service_account_file");
    let account = reader.text(table, "account").some();
    let account_key_file = path(reader, "account_key_file");
    let sas_token_file = path(reader, "sas_token_file");
    let passphrase_file = path(reader, "passphrase_file");
    let key_file = path(reader, "key_file");
    let mut rule = |key: &str, message: String, hint: &str| {
        let span = reader.key_span_of(&table.at.key(key));
        reader.mistake(Mistake::new(Kind::BrokenRule, span, message).hint(hint));
    };
    if access_key_file.is_some() != secret_key_file.is_some() {
        let (there, missing) = match access_key_file {
            Some(_) => ("access_key_file", "secret_key_file"),
            None => ("secret_key_file", "access_key_file"),
        };
        rule(there, format!("{there} is given without {missing}"), "a key has both parts");
    }
    if passphrase_file.is_some() && key_file.is_some() {
        let message = "passphrase_file and key_file are both given".to_owned();
        rule("key_file", message, "one of them opens the repository");
    }
    if account_key_file.is_some() && sas_token_file.is_some() {
        let message = "account_key_file and sas_token_file are both given".to_owned();
        rule("sas_token_file", message, "one of them opens the container");
    }
    let secret = match (passphrase_file, key_file) {
        (Some(file), _) => Some(SecretFile::Passphrase(file)),
        (None, Some(file)) => Some(SecretFile::Key(file)),
        (None, None) => None,
    };
    let location = match url {
        Read::Is(url) if url.starts_with(S3) => {
            say_nothing_of(reader, table, PlaceKind::S3);
            Location::S3 { url, region, endpoint, allow_http, access_key_file, secret_key_file }
        }
        Read::Is(url) if url.starts_with(GCS) => {
            say_nothing_of(reader, table, PlaceKind::Gcs);
            Location::Gcs { url, endpoint, allow_http, service_account_file }
        }
        Read::Is(url) if url.starts_with(AZURE) => {
            say_nothing_of(reader, table, PlaceKind::Azure);
            let Some(account) = account.filter(|account| is_account(account)) else {
                let message = format!("{url} is given without the name of a storage account");
                let hint = "account = \"shopbackups\": 3 to 24 small letters and digits";
                let at = if reader.has(&table.at.key("account")) { "account" } else { "repository" };
                let span = reader.key_span_of(&table.at.key(at));
                reader.mistake(Mistake::new(Kind::BrokenRule, span, message).hint(hint));
                return None;
            };
            let key = account_key_file.map(AzureKeyFile::AccountKey);
            let key = key.or(sas_token_file.map(AzureKeyFile::SasToken));
            Location::Azure { url, account, endpoint, allow_http, key }
        }
        Read::Is(url) if url.strip_prefix(FILE).is_some_and(|path| path.starts_with('/')) => {
            say_nothing_of(reader, table, PlaceKind::Directory);
            let path = PathBuf::from(&url[FILE.len()..]);
            match keeper {
                Read::Is(keeper) => Location::Kept { keeper, path, through: None },
                Read::Absent => Location::Directory(path),
                Read::Broken => return None,
            }
        }
        Read::Is(url) => {
            let at = table.at.key("repository");
            reader.wrong_value(
                &at,
                format!("\"{url}\" is no place of a repository"),
                Some(PLACES.to_owned()),
            );
            return None;
        }
        Read::Absent | Read::Broken => return None,
    };
    Some(RepositorySpec { location, secret })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(text: &str) -> String {
        read("repository.toml", text).unwrap_err().to_string()
    }

    #[test]
    fn a_directory_and_a_bucket() {
        let found = read("r", "repository = \"file:///srv/backups\"\nkey_file = \"/k\"\n").unwrap();
        assert_eq!(found.location, Location::Directory("/srv/backups".into()));
        assert_eq!(found.secret, Some(SecretFile::Key("/k".into())));
        let text = "repository = \"s3://b/f\"\nendpoint = \"http://127.0.0.1:1\"\nallow_http = true\n\
                    access_key_file = \"/a\"\nsecret_key_file = \"/s\"\n";
        let Location::S3 { url, endpoint, allow_http, secret_key_file, .. } =
            read("r", text).unwrap().location
        else {
            panic!("a bucket");
        };
        assert_eq!((url.as_str(), allow_http), ("s3://b/f", true));
        assert_eq!((endpoint.as_deref(), secret_key_file), (Some("http://127.0.0.1:1"), Some("/s".into())));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let s3 = Location::S3 {
            url: "s3://b/f".to_owned(),
            region: Some("eu".to_owned()),
            endpoint: Some("http://127.0.0.1:1".to_owned()),
            allow_http: true,
            access_key_file: Some("/a \"b\"".into()),
            secret_key_file: Some("/s".into()),
        };
        let gcs = Location::Gcs {
            url: "gs://b/f".to_owned(),
            endpoint: Some("https://storage.example".to_owned()),
            allow_http: false,
            service_account_file: Some("/etc/account.json".into()),
        };
        let azure = |key| Location::Azure {
            url: "azure://c/f".to_owned(),
            account: "shop1".to_owned(),
            endpoint: None,
            allow_http: true,
            key,
        };
        let kept = Location::Kept {
            keeper: "w".parse().unwrap(),
            path: "/srv/back ups".into(),
            through: Some(Through { address: "[::1]:8009".to_owned(), credentials: "/var/pki".into() }),
        };
        for (location, secret) in [
            (kept, None),
            (Location::Directory("/srv/back ups".into()), None),
            (Location::Directory("/srv".into()), Some(SecretFile::Key("/k".into()))),
            (s3, Some(SecretFile::Passphrase("/p".into()))),
            (gcs, None),
            (azure(None), None),
            (azure(Some(AzureKeyFile::AccountKey("/k".into()))), None),
            (azure(Some(AzureKeyFile::SasToken("/t".into()))), Some(SecretFile::Key("/k".into()))),
        ] {
            let repository = RepositorySpec { location, secret };
            assert_eq!(read("r", &write(&repository)).unwrap(), repository);
        }
    }

    #[test]
    fn every_mistake_is_told_with_its_line() {
        let told = wrong(
            "repository = \"/srv/backups\"\naccess_key_file = \"/a\"\npassphrase_file = \"/p\"\nkey_file = \"/k\"\n",
        );
        for part in [
            "repository.toml:1",
            "is no place of a repository",
            "repository.toml:2",
            "without secret_key_file",
            "both given",
        ] {
            assert!(told.contains(part), "{part} is not in\n{told}");
        }
        assert!(
            wrong("repository = \"file:///srv\"\nregion = \"x\"\n").contains("no meaning for a directory")
        );
        for (text, told) in [
            ("repository = \"file:///srv\"\nkeeper = \"w\"\n", "without keeper_address and credentials"),
            ("repository = \"file:///srv\"\nkeeper = \"W!\"\n", "repository.toml:2"),
            ("repository = \"s3://b/f\"\nkeeper = \"w\"\n", "no meaning for an object store"),
            ("repository = \"gs://b/f\"\nkeeper = \"w\"\n", "no meaning for an object store"),
            ("repository = \"s3://b/f\"\naccount = \"shop\"\n", "no meaning for a bucket of S3"),
            ("repository = \"gs://b/f\"\nregion = \"x\"\n", "no meaning for a bucket of Google's"),
            ("repository = \"azure://c\"\n", "without the name of a storage account"),
            ("repository = \"azure://c\"\naccount = \"a.b/c\"\n", "repository.toml:2"),
            (
                "repository = \"azure://c\"\naccount = \"shop\"\nservice_account_file = \"/a\"\n",
                "no meaning for a container of Azure",
            ),
            (
                "repository = \"azure://c\"\naccount = \"shop\"\naccount_key_file = \"/a\"\nsas_token_file = \"/b\"\n",
                "both given",
            ),
            ("repository = \"file:///srv\"\nsas_token_file = \"/t\"\n", "no meaning for a directory"),
            ("repository = \"file:///srv\"\ncredentials = \"/p\"\n", "without a keeper"),
        ] {
            assert!(wrong(text).contains(told), "{told} is not in\n{}", wrong(text));
        }
        assert!(wrong("").contains("repository"));
        assert!(wrong("repositry = \"file:///srv\"\n").contains("repository"));
    }
}
