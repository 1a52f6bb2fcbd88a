//! `repository.toml`: where a repository of backups is and what opens it, for commands that run without an agent: `archive_command`
//! and `restore_command` of a server that no herd has, and of a copy that was restored somewhere else.
//!
//! Hazard: secrets. They stand in files of their own, which the file names, and are never part of a command line.

use std::path::PathBuf;

use super::finding::{Findings, Kind, Mistake};
use super::reader::{Read, Reader, Section, key};

/// Where objects are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    Directory(PathBuf),
    S3 {
        /// `s3://bucket/folder`.
        url: String,
        region: Option<String>,
        endpoint: Option<String>,
        allow_http: bool,
        /// Files with the two parts of a key; without them the machine's own role is used.
        access_key_file: Option<PathBuf>,
        secret_key_file: Option<PathBuf>,
    },
}

/// What opens an encrypted repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretFile {
    Passphrase(PathBuf),
    Key(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryFile {
    pub location: Location,
    /// Without one it is not encrypted.
    pub secret: Option<SecretFile>,
}

const NONE: &str = "none";

static TOP: Section = Section {
    header: "",
    keys: &[
        key("repository", "a text", "\"s3://bucket/shop\"", "", "s3://bucket/folder, or file:///directory"),
        key("region", "a text", "\"eu-central-1\"", "us-east-1", "of S3"),
        key("endpoint", "a text", "\"https://minio.example:9000\"", NONE, "of a store that is not Amazon's"),
        key(
            "allow_http",
            "true or false",
            "true",
            "false",
            "whether the endpoint may be spoken to without TLS",
        ),
        key(
            "access_key_file",
            "a path",
            "\"/etc/pgherd/s3.id\"",
            NONE,
            "a file with the name of the access key",
        ),
        key(
            "secret_key_file",
            "a path",
            "\"/etc/pgherd/s3.key\"",
            NONE,
            "a file with its secret, for its owner only",
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
    ],
};

const FILE: &str = "file://";
const S3: &str = "s3://";

impl RepositoryFile {
    /// Reads a repository file; `file` is its name for messages.
    pub fn read(file: &str, text: &str) -> Result<RepositoryFile, Findings> {
        let (mut reader, top) = Reader::parse(text);
        let top = reader.top(&top, &TOP);
        let path = |reader: &mut Reader<'_>, key: &str| reader.text(&top, key).some().map(PathBuf::from);
        let url = reader.text(&top, "repository");
        let region = reader.text(&top, "region").some();
        let endpoint = reader.text(&top, "endpoint").some();
        let allow_http = reader.switch(&top, "allow_http").or(false);
        let access_key_file = path(&mut reader, "access_key_file");
        let secret_key_file = path(&mut reader, "secret_key_file");
        let passphrase_file = path(&mut reader, "passphrase_file");
        let key_file = path(&mut reader, "key_file");
        let mut rule = |key: &str, message: String, hint: &str| {
            let span = reader.key_span_of(&top.at.key(key));
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
        let location = match &url {
            Read::Is(url) if url.starts_with(S3) => Some(Location::S3 {
                url: url.clone(),
                region,
                endpoint,
                allow_http,
                access_key_file,
                secret_key_file,
            }),
            Read::Is(url) if url.strip_prefix(FILE).is_some_and(|path| path.starts_with('/')) => {
                for key in ["region", "endpoint", "allow_http", "access_key_file", "secret_key_file"] {
                    if reader.has(&top.at.key(key)) {
                        let span = reader.key_span_of(&top.at.key(key));
                        let message = format!("\"{key}\" has no meaning for a directory");
                        reader.mistake(Mistake::new(Kind::BrokenRule, span, message).hint("leave it out"));
                    }
                }
                Some(Location::Directory(PathBuf::from(&url[FILE.len()..])))
            }
            Read::Is(url) => {
                let hint = "repository = \"file:///srv/backups\", or \"s3://bucket/folder\"".to_owned();
                reader.wrong_value(
                    &top.at.key("repository"),
                    format!("\"{url}\" is no place of a repository"),
                    Some(hint),
                );
                None
            }
            Read::Absent | Read::Broken => None,
        };
        let secret = match (passphrase_file, key_file) {
            (Some(file), _) => Some(SecretFile::Passphrase(file)),
            (None, Some(file)) => Some(SecretFile::Key(file)),
            (None, None) => None,
        };
        match location {
            Some(location) if !reader.has_errors() => Ok(RepositoryFile { location, secret }),
            _ => Err(reader.finish(file)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(text: &str) -> String {
        RepositoryFile::read("repository.toml", text).unwrap_err().to_string()
    }

    #[test]
    fn a_directory_and_a_bucket() {
        let read =
            RepositoryFile::read("r", "repository = \"file:///srv/backups\"\nkey_file = \"/k\"\n").unwrap();
        assert_eq!(read.location, Location::Directory("/srv/backups".into()));
        assert_eq!(read.secret, Some(SecretFile::Key("/k".into())));
        let text = "repository = \"s3://b/f\"\nendpoint = \"http://127.0.0.1:1\"\nallow_http = true\n\
                    access_key_file = \"/a\"\nsecret_key_file = \"/s\"\n";
        let Location::S3 { url, endpoint, allow_http, secret_key_file, .. } =
            RepositoryFile::read("r", text).unwrap().location
        else {
            panic!("a bucket");
        };
        assert_eq!((url.as_str(), allow_http), ("s3://b/f", true));
        assert_eq!((endpoint.as_deref(), secret_key_file), (Some("http://127.0.0.1:1"), Some("/s".into())));
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
        assert!(wrong("").contains("repository"));
        assert!(wrong("repositry = \"file:///srv\"\n").contains("repository"));
    }
}
