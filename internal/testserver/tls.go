package testserver

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// TLSMode says how a server's clients connect.
type TLSMode uint8

// The modes.
const (
	// NoTLS is plain TCP.
	NoTLS TLSMode = iota
	// ServerTLS has the server show a certificate.
	ServerTLS
	// MutualTLS has both sides show one.
	MutualTLS
)

// The PEM files in a server's directory.
const (
	caFile         = "ca.pem"
	serverCertFile = "server.pem"
	serverKeyFile  = "server-key.pem"
	clientCertFile = "client.pem"
	clientKeyFile  = "client-key.pem"
)

// identity is a CA made for one server or cluster, and what its clients need.
type identity struct {
	dir    string // where the files are
	mode   TLSMode
	client *tls.Config
}

func (id *identity) path(file string) string { return filepath.Join(id.dir, file) }

// newIdentity writes a throwaway CA with a certificate for each side to dir. Nothing
// is checked in, so nothing expires and no key is worth stealing.
func newIdentity(dir string, mode TLSMode) (*identity, error) {
	ca := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "dchannel test CA"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	caKey, err := issue(ca, ca, nil, filepath.Join(dir, caFile), "")
	if err != nil {
		return nil, err
	}
	server := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "localhost"},
		DNSNames:    []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		// etcd's gateway is a client of its own port and shows the server's certificate.
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if _, err = issue(server, ca, caKey, filepath.Join(dir, serverCertFile), filepath.Join(dir, serverKeyFile)); err != nil {
		return nil, err
	}
	client := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "dchannel test client"},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if _, err = issue(client, ca, caKey, filepath.Join(dir, clientCertFile), filepath.Join(dir, clientKeyFile)); err != nil {
		return nil, err
	}

	pool := x509.NewCertPool()
	pool.AddCert(ca)
	cfg := &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	if mode == MutualTLS {
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, clientCertFile), filepath.Join(dir, clientKeyFile))
		if err != nil {
			return nil, err
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return &identity{dir: dir, mode: mode, client: cfg}, nil
}

// issue signs cert with the CA's key, or with its own if that is nil, and completes
// cert with what was signed.
func issue(cert, ca *x509.Certificate, caKey *ecdsa.PrivateKey, certName, keyName string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if caKey == nil {
		caKey = key
	}
	if cert.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return nil, err
	}
	cert.NotBefore = time.Now().Add(-time.Hour)
	cert.NotAfter = time.Now().Add(24 * time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, cert, ca, &key.PublicKey, caKey)
	if err != nil {
		return nil, err
	}
	signed, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	*cert = *signed
	if err := writePEM(certName, "CERTIFICATE", der); err != nil || keyName == "" {
		return key, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, writePEM(keyName, "PRIVATE KEY", pkcs8)
}

func writePEM(name, kind string, der []byte) error {
	return os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
