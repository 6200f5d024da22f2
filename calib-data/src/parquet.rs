//! A text column of a Parquet file, one document a row.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::Type as Physical;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use sha2::{Digest, Sha256};

use crate::error::{Error, RecordFault, Result};
use crate::path::{display, read_error};
use crate::text::{Document, Stream};
use crate::window::hex;

/// Reads the column `field` into `stream` and returns the SHA-256 of the file's bytes. `progress` is
/// told the part of the file that the rows read so far stand for, in bytes.
pub(crate) fn read(
    path: &Path,
    field: &str,
    stream: &mut Stream<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<String> {
    let failed = |source: ParquetError| Error::Parquet {
        file: display(path),
        source,
    };
    let sha256 = sha256(path)?;
    let file = File::open(path).map_err(|error| read_error(path, error))?;
    let bytes = file
        .metadata()
        .map_err(|error| read_error(path, error))?
        .len();
    let reader = SerializedFileReader::new(file).map_err(failed)?;
    let metadata = reader.metadata().file_metadata();
    let rows = u64::try_from(metadata.num_rows())
        .unwrap_or_default()
        .max(1);
    let projection = text_column(metadata.schema(), field, path)?;
    let read_rows = reader.get_row_iter(Some(projection)).map_err(failed)?;
    for (row, record) in (1..).zip(read_rows) {
        let text = text(&record.map_err(failed)?, field).map_err(|fault| Error::Record {
            file: display(path),
            line: row,
            fault,
        })?;
        stream.push(Document::Text(text))?;
        progress((u128::from(bytes) * row as u128 / u128::from(rows)) as u64);
    }
    Ok(sha256)
}

/// A schema of the wanted column alone.
fn text_column(schema: &Type, field: &str, path: &Path) -> Result<Type> {
    let is_text = |column: &&Arc<Type>| {
        column.is_primitive() && column.get_physical_type() == Physical::BYTE_ARRAY
    };
    let columns = || schema.get_fields().iter().filter(is_text);
    let Some(column) = columns().find(|column| column.name() == field) else {
        let names: Vec<String> = columns()
            .map(|column| format!("`{}`", column.name()))
            .collect();
        let columns = if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        };
        return Err(Error::ParquetColumn {
            file: display(path),
            field: field.to_owned(),
            columns,
        });
    };
    Type::group_type_builder(schema.name())
        .with_fields(vec![Arc::clone(column)])
        .build()
        .map_err(|source| Error::Parquet {
            file: display(path),
            source,
        })
}

/// The only cell of a projected row.
fn text(row: &Row, field: &str) -> Result<String, RecordFault> {
    match row.get_column_iter().next() {
        Some((_, Field::Str(text))) => Ok(text.clone()),
        Some((_, Field::Bytes(bytes))) => {
            String::from_utf8(bytes.data().to_vec()).map_err(|_| RecordFault::NotUtf8)
        }
        _ => Err(RecordFault::Null(field.to_owned())),
    }
}

fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(|error| read_error(path, error))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file
            .read(&mut buffer)
            .map_err(|error| read_error(path, error))?
        {
            0 => return Ok(hex(hasher)),
            count => hasher.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use crate::testing::{EOS, VOCAB, says, tiny};
    use crate::{Result, Source, WindowSpec, Windows, load};
    use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    const SCHEMA: &str = "message rows { required int32 n; optional binary text (UTF8); \
                          required binary raw; }";

    /// Rows of a number, a text that may be missing, and the same text as bytes.
    fn write(path: &Path, rows: &[Option<&str>]) {
        let schema = Arc::new(parse_message_type(SCHEMA).unwrap());
        let properties = Arc::new(WriterProperties::builder().build());
        let file = std::fs::File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, properties).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let numbers: Vec<i32> = (0..rows.len() as i32).collect();
        column
            .typed::<Int32Type>()
            .write_batch(&numbers, None, None)
            .unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let there: Vec<ByteArray> = rows.iter().flatten().map(|&text| text.into()).collect();
        let levels: Vec<i16> = rows.iter().map(|row| row.is_some().into()).collect();
        column
            .typed::<ByteArrayType>()
            .write_batch(&there, Some(&levels), None)
            .unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let raw: Vec<ByteArray> = rows.iter().map(|row| row.unwrap_or("-").into()).collect();
        column
            .typed::<ByteArrayType>()
            .write_batch(&raw, None, None)
            .unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
    }

    fn read(rows: &[Option<&str>], field: &str, tokens: usize) -> Result<Windows> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        write(&path, rows);
        let spec = WindowSpec {
            windows: 1,
            tokens,
            seed: 0,
        };
        load(
            Source::Files(vec![path]),
            Some(&tiny()),
            &spec,
            field,
            VOCAB,
            &mut |_, _| (),
        )
    }

    #[test]
    fn rows_are_documents() {
        let part = |text: &str| tiny().encode(text).unwrap();
        let expected = [part("One text.").as_slice(), &[EOS], &part("Another.")].concat();
        for field in ["text", "raw"] {
            let windows = read(
                &[Some("One text."), Some("Another.")],
                field,
                expected.len(),
            )
            .unwrap();
            assert_eq!(windows.ids(), expected, "{field}");
            assert_eq!(windows.files[0].1.len(), 64);
        }
    }

    #[test]
    fn bad_columns_rows_and_files_are_named() {
        says(
            read(&[Some("a")], "body", 1),
            &["no text column `body`", "`text`, `raw`"],
        );
        says(read(&[Some("a")], "n", 1), &["no text column `n`"]);
        says(
            read(&[Some("a"), None], "text", 1),
            &["a.parquet:2`", "no text in column `text`"],
        );
        let (_folder, path) = crate::testing::file("b.parquet", "PAR1 and no more");
        let spec = WindowSpec {
            windows: 1,
            tokens: 1,
            seed: 0,
        };
        let files = Source::Files(vec![path]);
        let got = load(files, Some(&tiny()), &spec, "text", VOCAB, &mut |_, _| ());
        says(got, &["b.parquet` cannot be read as Parquet"]);
    }
}
