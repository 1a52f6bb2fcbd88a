//! Whom a client's certificate names: its common name, and its whole subject as PostgreSQL writes it.
//!
//! For `clientname=DN` PostgreSQL compares what OpenSSL prints of the subject (`XN_FLAG_RFC2253`, manual 21.12): the last part
//! first, short names where OpenSSL has one, escapes as in RFC 2253, everything else in hexadecimal digits. Every byte that has a
//! meaning there is escaped, so that no value can look like another part.
//!
//! Leaves out whether the certificate is worth anything. Hazard: two subjects that look the same.

use std::fmt::Write as _;

use rustls::pki_types::CertificateDer;
use x509_parser::asn1_rs::{Any, Oid, Tag, ToDer as _};
use x509_parser::prelude::{FromDer, X509Certificate};

/// `None` for what cannot be read, or what it would depend on the reader to read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    pub common: Option<String>,
    pub subject: Option<String>,
}

/// OpenSSL's short names of what stands in subjects. Whatever is not here is written as its number, as OpenSSL does with what it
/// does not know itself.
const SHORT: &[(&str, &str)] = &[
    ("0.9.2342.19200300.100.1.1", "UID"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("0.9.2342.19200300.100.1.3", "mail"),
    ("1.2.840.113549.1.9.1", "emailAddress"),
    ("1.2.840.113549.1.9.2", "unstructuredName"),
    ("1.2.840.113549.1.9.8", "unstructuredAddress"),
    ("1.3.6.1.4.1.311.60.2.1.1", "jurisdictionL"),
    ("1.3.6.1.4.1.311.60.2.1.2", "jurisdictionST"),
    ("1.3.6.1.4.1.311.60.2.1.3", "jurisdictionC"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("2.5.4.12", "title"),
    ("2.5.4.13", "description"),
    ("2.5.4.15", "businessCategory"),
    ("2.5.4.16", "postalAddress"),
    ("2.5.4.17", "postalCode"),
    ("2.5.4.18", "postOfficeBox"),
    ("2.5.4.20", "telephoneNumber"),
    ("2.5.4.3", "CN"),
    ("2.5.4.4", "SN"),
    ("2.5.4.41", "name"),
    ("2.5.4.42", "GN"),
    ("2.5.4.43", "initials"),
    ("2.5.4.44", "generationQualifier"),
    ("2.5.4.45", "x500UniqueIdentifier"),
    ("2.5.4.46", "dnQualifier"),
    ("2.5.4.5", "serialNumber"),
    ("2.5.4.6", "C"),
    ("2.5.4.65", "pseudonym"),
    ("2.5.4.7", "L"),
    ("2.5.4.72", "role"),
    ("2.5.4.8", "ST"),
    ("2.5.4.9", "street"),
    ("2.5.4.97", "organizationIdentifier"),
];

impl Names {
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Names {
        let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return Names::default() };
        let subject = parsed.subject();
        let mut common = subject.iter_common_name();
        let first = common.next().and_then(|name| name.as_str().ok());
        // More than one: whose it is would depend on who reads it.
        let lone = first.filter(|name| common.next().is_none() && !name.is_empty() && !name.contains('\0'));
        let mut written = String::new();
        let mut parts: Vec<Vec<(&Oid<'_>, &Any<'_>)>> = Vec::new();
        for part in subject.iter_rdn() {
            parts.push(part.iter().map(|one| (one.attr_type(), one.attr_value())).collect());
        }
        let is_written = write(&parts, &mut written).is_some();
        Names { common: lone.map(str::to_owned), subject: is_written.then_some(written) }
    }
}

fn write(parts: &[Vec<(&Oid<'_>, &Any<'_>)>], out: &mut String) -> Option<()> {
    for (at, part) in parts.iter().rev().enumerate() {
        for (beside, (oid, value)) in part.iter().rev().enumerate() {
            out.push_str(match (at, beside) {
                (0, 0) => "",
                (_, 0) => ",",
                _ => "+",
            });
            let number = oid.to_id_string();
            let short = SHORT.iter().find(|(known, _)| *known == number);
            match (short, text(value)) {
                (Some((_, short)), Text::Is(text)) => {
                    out.push_str(short);
                    out.push('=');
                    escape(&text, out);
                }
                (_, Text::Broken) => return None,
                (short, _) => {
                    let name = short.map_or(number.as_str(), |(_, short)| *short);
                    write!(out, "{name}=#").ok()?;
                    for byte in value.to_der_vec().ok()? {
                        write!(out, "{byte:02X}").ok()?;
                    }
                }
            }
        }
    }
    Some(())
}

enum Text {
    Is(String),
    /// No text.
    Other,
    /// No text of the kind that it says.
    Broken,
}

fn text(value: &Any<'_>) -> Text {
    let wide = |width: usize| {
        let letters = value.data.chunks_exact(width);
        let is_whole = letters.remainder().is_empty();
        let number = |bytes: &[u8]| bytes.iter().fold(0_u32, |number, byte| number << 8 | u32::from(*byte));
        let text: Option<String> = letters.map(|bytes| char::from_u32(number(bytes))).collect();
        text.filter(|_| is_whole).map_or(Text::Broken, Text::Is)
    };
    match value.tag() {
        Tag::Utf8String => {
            std::str::from_utf8(value.data).map_or(Text::Broken, |text| Text::Is(text.to_owned()))
        }
        // Those of one byte are read as Latin-1.
        Tag::NumericString
        | Tag::PrintableString
        | Tag::T61String
        | Tag::Ia5String
        | Tag::UtcTime
        | Tag::GeneralizedTime
        | Tag::VisibleString => wide(1),
        Tag::BmpString => wide(2),
        Tag::UniversalString => wide(4),
        _ => Text::Other,
    }
}

/// `do_esc_char` of OpenSSL with the flags of RFC 2253, byte by byte of UTF-8. What is special only in front is not where it is
/// the last letter, too.
fn escape(text: &str, out: &mut String) {
    let last = text.char_indices().next_back().map_or(0, |(at, _)| at);
    for (at, byte) in text.bytes().enumerate() {
        let is_special = match byte {
            b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';' => true,
            b' ' => at == 0 || at == last,
            b'#' => at == 0 && at != last,
            _ => false,
        };
        if is_special {
            out.push('\\');
        }
        if byte.is_ascii_graphic() || byte == b' ' {
            out.push(char::from(byte));
        } else {
            write!(out, "\\{byte:02X}").expect("a String takes any text");
        }
    }
}

#[cfg(test)]
mod tests;
