package nats

import (
	"context"
	"errors"
	"fmt"

	natsgo "github.com/nats-io/nats.go"

	"github.com/dchannel/dchannel"
)

// What the driver itself has to say about a call.
var (
	errNotConnected = errors.New("nats: not connected")
	errCut          = errors.New("nats: the connection broke")
	errNoAnswer     = errors.New("nats: the server did not answer in time")
	errContended    = errors.New("nats: others were faster every time")
	errClosed       = fmt.Errorf("%w: nats", dchannel.ErrBackendClosed)
)

// apiError is an error that JetStream answered with.
type apiError struct {
	Code        int    `json:"code"`
	ErrCode     int    `json:"err_code"`
	Description string `json:"description"`
}

func (e *apiError) Error() string {
	return fmt.Sprintf("nats: %s (%d)", e.Description, e.ErrCode)
}

// JetStream's error codes that mean something to the driver: see errors.json in
// the server's source.
const (
	codeStreamNotFound   = 10059
	codeStreamNameInUse  = 10058
	codeWrongLastSeq     = 10071 // somebody else was faster
	codeWrongLastSeqR    = 10164 // the same from a replicated stream, sometimes without a real conflict
	codeMessageTooLarge  = 10054
	codeHeadersTooLarge  = 10097
	codeStoreFailed      = 10077 // "maximum bytes exceeded", a full disk
	codeNoJetStream      = 10039 // for the account
	codeInsufficient     = 10023
	codeClusterNotLeader = 10009
	codeClusterNoPeers   = 10005
)

// conflict says that an append was refused because the log has moved.
func conflict(err error) bool {
	var api *apiError
	return errors.As(err, &api) && (api.ErrCode == codeWrongLastSeq || api.ErrCode == codeWrongLastSeqR)
}

// streamMissing says that there may be no stream: nobody listens on its subjects.
func streamMissing(err error) bool {
	var api *apiError
	return errors.Is(err, natsgo.ErrNoResponders) || errors.As(err, &api) && api.ErrCode == codeStreamNotFound
}

// mapError wraps err with the sentinel that the contract asks for. maybe says that
// a write was sent and not answered, so that it may have happened.
func mapError(err error, maybe bool) error {
	if err == nil || sentinel(err) != nil {
		return err
	}
	kind := dchannel.ErrUnavailable
	var api *apiError
	switch {
	case errors.Is(err, natsgo.ErrPermissionViolation), errors.Is(err, natsgo.ErrAuthorization):
		kind = dchannel.ErrRefused
	case errors.Is(err, natsgo.ErrMaxPayload):
		kind = dchannel.ErrTooLarge
	case errors.As(err, &api):
		kind = api.sentinel()
	case maybe:
		kind = dchannel.ErrUncertain
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, natsgo.ErrConnectionClosed), errors.Is(err, natsgo.ErrConnectionDraining):
		kind = dchannel.ErrBackendClosed
	}
	return fmt.Errorf("%w: %w", kind, err)
}

func (e *apiError) sentinel() error {
	switch e.ErrCode {
	case codeMessageTooLarge, codeHeadersTooLarge:
		return dchannel.ErrTooLarge
	case codeStreamNotFound, codeClusterNotLeader, codeClusterNoPeers, codeWrongLastSeq, codeWrongLastSeqR:
		return dchannel.ErrUnavailable
	case codeNoJetStream, codeInsufficient, codeStoreFailed:
		return dchannel.ErrRefused
	}
	if e.Code == 503 || e.Code == 429 { // an election, a restart, too many requests
		return dchannel.ErrUnavailable
	}
	return dchannel.ErrRefused
}

// sentinel returns the contract's sentinel that err already wraps, if any.
func sentinel(err error) error {
	for _, s := range []error{
		dchannel.ErrUncertain, dchannel.ErrUnavailable, dchannel.ErrRefused, dchannel.ErrChanClosed,
		dchannel.ErrTooLarge, dchannel.ErrBackendClosed, dchannel.ErrInvalidOption,
	} {
		if errors.Is(err, s) {
			return s
		}
	}
	return nil
}
