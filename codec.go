package dchannel

import (
	"encoding/json"
	"fmt"
	"unsafe"

	"github.com/dchannel/dchannel/internal/frame"
)

// Codec turns values into bytes and back. Strings and []byte never pass through it.
// It must be safe for concurrent use.
type Codec interface {
	// Name is the codec's name on the wire: short, and the same for ever.
	Name() string
	// Marshal encodes v. The result is copied before Publish returns.
	Marshal(v any) ([]byte, error)
	// Unmarshal decodes data into v, a pointer. It must not keep data, nor write to
	// it. Listen passes a *any; typed views pass a *T.
	Unmarshal(data []byte, v any) error
}

// JSON is the default codec: encoding/json. Listen returns what that package
// decodes into an any: map[string]any, []any, float64, string, bool or nil.
var JSON Codec = jsonCodec{}

const jsonName = "json"

type jsonCodec struct{}

func (jsonCodec) Name() string                       { return jsonName }
func (jsonCodec) Marshal(v any) ([]byte, error)      { return json.Marshal(v) }
func (jsonCodec) Unmarshal(data []byte, v any) error { return json.Unmarshal(data, v) }

// encode turns a message into a record. The record's payload may alias msg.
func encode(c Codec, msg any, headers []string) (r frame.Record, err error) {
	r.Headers = headers
	switch v := msg.(type) {
	case []byte:
		r.Kind, r.Payload = frame.Bytes, v
		return r, nil
	case string:
		r.Kind = frame.String
		r.Payload = unsafe.Slice(unsafe.StringData(v), len(v)) // only read, and copied into the frame
		return r, nil
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %s panicked on a %T: %v", ErrCodec, c.Name(), msg, p)
		}
	}()
	if r.Payload, err = c.Marshal(msg); err != nil {
		return r, fmt.Errorf("%w: %s refused a %T: %w", ErrCodec, c.Name(), msg, err)
	}
	if r.Kind = frame.JSON; c.Name() != jsonName {
		r.Kind, r.Codec = frame.Custom, c.Name()
	}
	return r, nil
}

// decode turns a record into a value: a string, a []byte, or what c makes of it.
func decode(c Codec, r *frame.Record) (any, error) {
	switch r.Kind {
	case frame.String:
		return string(r.Payload), nil
	case frame.Bytes:
		return append([]byte{}, r.Payload...), nil
	}
	var v any
	if err := decodeInto(c, r, &v); err != nil {
		return nil, err
	}
	return v, nil
}

// decodeTo decodes into a pointer.
func decodeTo(c Codec, r *frame.Record, v any) error {
	switch p := v.(type) {
	case *string:
		if r.Kind == frame.String || r.Kind == frame.Bytes {
			*p = string(r.Payload)
			return nil
		}
	case *[]byte:
		if r.Kind == frame.String || r.Kind == frame.Bytes {
			*p = append([]byte{}, r.Payload...)
			return nil
		}
	case *any:
		x, err := decode(c, r)
		if err == nil {
			*p = x
		}
		return err
	}
	if r.Kind == frame.String || r.Kind == frame.Bytes {
		return fmt.Errorf("%w: the message is a string or []byte, not a %T", ErrCodec, v)
	}
	return decodeInto(c, r, v)
}

func decodeInto(c Codec, r *frame.Record, v any) (err error) {
	name := jsonName
	if r.Kind == frame.Custom {
		name = r.Codec
	}
	if name != c.Name() {
		return fmt.Errorf("%w: the message was encoded by %q, this handle has %q", ErrCodec, name, c.Name())
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %s panicked: %v", ErrCodec, c.Name(), p)
		}
	}()
	if err := c.Unmarshal(r.Payload, v); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrCodec, c.Name(), err)
	}
	return nil
}
