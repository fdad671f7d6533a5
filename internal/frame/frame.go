// Package frame is the wire format of a frame: the records of one group commit as
// one run of bytes. docs/wire.md describes it for other languages.
//
//	frame   = version record…            version is the byte 0x01
//	record  = kind [headers] [codec] size payload
//	kind    = one byte: 0 bytes, 1 string, 2 JSON, 3 another codec; +0x80 with headers
//	headers = n (key value)…             n pairs
//	codec   = name                       only with kind 3
//	key, value, name = size bytes…
//	n, size = unsigned varint, as in Protocol Buffers
package frame

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Version is the first byte of every frame.
const Version = 1

// The kinds of a record.
const (
	Bytes byte = iota
	String
	JSON
	Custom

	withHeaders byte = 0x80
)

// ErrCorrupt is wrapped by Reader's errors.
var ErrCorrupt = errors.New("corrupt frame")

// Record is one message in a frame.
type Record struct {
	// Kind is Bytes, String, JSON or Custom.
	Kind byte
	// Codec names the codec of a Custom record.
	Codec string
	// Headers are pairs: key, value, key, value…
	Headers []string
	// Payload is the encoded value. What Reader returns aliases the frame.
	Payload []byte
}

// Begin appends what every frame begins with.
func Begin(dst []byte) []byte { return append(dst, Version) }

// Append appends one record.
func Append(dst []byte, r Record) []byte {
	kind := r.Kind
	if len(r.Headers) > 0 {
		kind |= withHeaders
	}
	dst = append(dst, kind)
	if len(r.Headers) > 0 {
		dst = binary.AppendUvarint(dst, uint64(len(r.Headers)/2))
		for _, s := range r.Headers {
			dst = appendString(dst, s)
		}
	}
	if r.Kind == Custom {
		dst = appendString(dst, r.Codec)
	}
	dst = binary.AppendUvarint(dst, uint64(len(r.Payload)))
	return append(dst, r.Payload...)
}

// Overhead bounds from above what Append adds to the payload.
func Overhead(r Record) int {
	n := 1 + 2*binary.MaxVarintLen32 + len(r.Codec) + binary.MaxVarintLen32
	for _, s := range r.Headers {
		n += binary.MaxVarintLen32 + len(s)
	}
	return n
}

func appendString(dst []byte, s string) []byte {
	return append(binary.AppendUvarint(dst, uint64(len(s))), s...)
}

// Reader reads a frame record by record. The zero Reader is at the end.
type Reader struct{ rest []byte }

// Open checks the frame's beginning and returns a Reader.
func Open(data []byte) (Reader, error) {
	if len(data) == 0 {
		return Reader{}, fmt.Errorf("%w: empty", ErrCorrupt)
	}
	if data[0] != Version {
		return Reader{}, fmt.Errorf("%w: version %d, want %d", ErrCorrupt, data[0], Version)
	}
	return Reader{data[1:]}, nil
}

// More reports whether there is another record.
func (r *Reader) More() bool { return len(r.rest) > 0 }

// Next reads a record. After an error the Reader is at the end.
func (r *Reader) Next() (rec Record, err error) {
	b := r.rest
	r.rest = nil
	if len(b) == 0 {
		return rec, fmt.Errorf("%w: no record left", ErrCorrupt)
	}
	kind := b[0]
	b = b[1:]
	rec.Kind = kind &^ withHeaders
	if rec.Kind > Custom {
		return rec, fmt.Errorf("%w: record kind %d", ErrCorrupt, rec.Kind)
	}
	if kind&withHeaders != 0 {
		n, w := binary.Uvarint(b)
		// Two bytes is the least that a pair takes: a count above that is a lie, and
		// must not make us allocate.
		if w <= 0 || n > uint64(len(b)/2) {
			return rec, fmt.Errorf("%w: header count", ErrCorrupt)
		}
		b = b[w:]
		rec.Headers = make([]string, 0, 2*n)
		for range 2 * n {
			var s []byte
			if s, b, err = cut(b); err != nil {
				return rec, err
			}
			rec.Headers = append(rec.Headers, string(s))
		}
	}
	if rec.Kind == Custom {
		var s []byte
		if s, b, err = cut(b); err != nil {
			return rec, err
		}
		rec.Codec = string(s)
	}
	if rec.Payload, b, err = cut(b); err != nil {
		return rec, err
	}
	r.rest = b
	return rec, nil
}

func cut(b []byte) (s, rest []byte, err error) {
	n, w := binary.Uvarint(b)
	if w <= 0 || n > uint64(len(b)-w) {
		return nil, nil, fmt.Errorf("%w: a size beyond the end", ErrCorrupt)
	}
	end := w + int(n)
	return b[w:end:end], b[end:], nil
}
